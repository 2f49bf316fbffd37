"""The mail servers of `smtp-dup demo`: "old" stands for the primary, "new" for a backup, "shop" for that of a route.

Real SMTP servers that keep no mail. Each writes its actions as JSON lines into a file that display.py reads. A message
without smtp-dup's Received line is shown without an id.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.parser import BytesHeaderParser
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session

OLD_DOES_NOT_KNOW = ("zoe@example.com", "gone@example.com")
NEW_DEFERS_ONCE = ("dave@example.com",)
NEW_DOES_NOT_KNOW = ("erin@example.com",)
NEW_IS_FULL_FOR = ("grace@example.com",)

_OUR_ID = re.compile(rb"\(smtp-dup\) with \w+ id (\w+);")


@dataclass(slots=True)
class Server:
    """The replies of one server."""

    name: str
    seen: Path
    unknown: tuple[str, ...] = ()
    deferred_once: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    _deferred: set[str] = field(default_factory=set)

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's  (the name is aiosmtpd's)
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address in self.unknown:
            return self._note([address], "550 5.1.1 Unknown")
        if address in self.full:
            return self._note([address], "552 5.2.2 Mailbox is full")
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        to = list(envelope.rcpt_tos)
        later = [a for a in to if a in self.deferred_once and a not in self._deferred]
        self._deferred.update(later)
        reply = "451 4.7.1 Greylisted" if later else "250 2.0.0 Ok"
        return self._note(to, reply, envelope.original_content or b"")

    def _note(self, recipients: list[str], reply: str, content: bytes = b"") -> str:
        found = _OUR_ID.search(content)
        line = {
            "server": self.name,
            "recipients": recipients,
            "reply": reply,
            "id": found[1].decode() if found else "",
            "subject": _subject(content),
        }
        with self.seen.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return reply


def _subject(content: bytes) -> str:
    written = str(BytesHeaderParser().parsebytes(content)["Subject"] or "")
    try:
        return str(make_header(decode_header(written)))
    except (ValueError, LookupError, HeaderParseError):  # an encoding that is none
        return written


def serve(listeners: Mapping[str, socket.socket], seen: Path) -> int:
    """Run the servers until SIGTERM; the ``run`` of a supervisor's child. ``listeners`` has their names."""
    servers = (
        Server("old", seen, unknown=OLD_DOES_NOT_KNOW),
        Server("new", seen, unknown=NEW_DOES_NOT_KNOW, deferred_once=NEW_DEFERS_ONCE, full=NEW_IS_FULL_FOR),
        Server("shop", seen),
    )
    asyncio.run(_serve(listeners, [server for server in servers if server.name in listeners]))
    return 0


async def _serve(listeners: Mapping[str, socket.socket], servers: Sequence[Server]) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)

    def speak(server: Server) -> SMTP:
        return SMTP(server, hostname=f"{server.name}.example.com", ident="demo", enable_SMTPUTF8=True, loop=loop)

    open_servers = [
        await loop.create_server(lambda server=server: speak(server), sock=listeners[server.name])  # type: ignore[misc]  # bound
        for server in servers
    ]
    await stop.wait()
    for listening in open_servers:
        listening.close()
