"""How addresses are kept in the trace (``trace.addresses``): clear, hashed, or off.

Hashed, an address is a keyed BLAKE2b of 64 bits and its domain, so that whoever knows the address finds its mail and
whoever reads the files sees domains alone; the key is a file beside them, of this installation. With ``off`` neither
addresses nor domains are kept. Then, and hashed, a reply is kept without the addresses that it names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from relay import private_files
from relay.trace.events import Event, More, Received, Remark, Tried

CLEAR, HASHED = "clear", "hashed"
KEY_FILE = "key"
_KEY_OCTETS = 32
_MARK = "~"  # in front of what is hashed: no address that a client sends has 16 hex digits behind it by accident
_HASHED = re.compile(r"~[0-9a-f]{16}(?=@|$)")
_ADDRESS = re.compile(r"[^\s<>\"'()\[\],;:]{1,256}@(?:\[[^\]\s]{1,80}\]|[^\s<>\"'()\[\],;:]{1,255})")
_SHORTEST = 4  # letters of a local part that is taken out of a reply where it stands alone
_GONE = "<...>"


def key_of(folder: Path, *, make: bool = False) -> bytes | None:
    """Return the key of this installation; None where there is none. Raises OSError."""
    try:
        found = private_files.read(folder, KEY_FILE, _KEY_OCTETS)
    except FileNotFoundError:
        if not make:
            return None
        private_files.write(folder, KEY_FILE, os.urandom(_KEY_OCTETS))
        found = private_files.read(folder, KEY_FILE, _KEY_OCTETS)
    if len(found) != _KEY_OCTETS:
        raise OSError(f"{folder / KEY_FILE} is damaged: remove it, and what was hashed with it is not found any more")
    return found


class Privacy:
    """One way to keep addresses. ``key`` is needed where they are hashed."""

    def __init__(self, mode: str, key: bytes | None = None) -> None:
        self.mode = mode
        self._hash = hashlib.blake2b(digest_size=8, key=key, person=b"smtp-dup trace") if key else None
        self.pseudonym = lru_cache(maxsize=4096)(self._pseudonym)

    def _pseudonym(self, address: str) -> str:
        """Return what stands for an address: its hash, and its domain."""
        assert self._hash is not None  # noqa: S101 - whoever hashes has a key
        if not address:
            return address
        made = self._hash.copy()
        made.update(address.lower().encode("utf-8", "surrogatepass"))
        _, at, domain = address.rpartition("@")
        return f"{_MARK}{made.hexdigest()}{at}{domain.lower() if at else ''}"

    def keep(self, event: Event) -> Event:
        """Return an event as it is kept."""
        if self.mode == CLEAR:
            return event
        names = list(_names(event))
        match event:
            case Received():
                return replace(
                    event,
                    sender=self._kept(event.sender),
                    recipients=self._those_kept(event.recipients),
                    refused=tuple(
                        one._replace(recipient=self._kept(one.recipient), reply=_cleared(one.reply, names))
                        for one in event.refused
                    ),
                    reply=_cleared(event.reply, names),
                    mail_reply=_cleared(event.mail_reply, names),
                    rcpt_replies=tuple(_cleared(reply, names) for reply in event.rcpt_replies),
                )
            case More():
                return replace(event, recipients=tuple(map(self._kept, event.recipients)))
            case Tried():
                parts = [
                    part._replace(recipients=self._those_kept(part.recipients), reply=_cleared(part.reply, names))
                    for part in event.parts
                ]
                return replace(event, parts=tuple(parts))
            case Remark():
                return replace(event, text=_cleared(event.text, names))

    def _those_kept(self, addresses: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(self._kept, addresses)) if self.mode == HASHED else ()

    def _kept(self, address: str) -> str:
        if self.mode == HASHED:
            return str(self.pseudonym(address))
        return address and _GONE


def _names(event: Event) -> Iterator[str]:
    match event:
        case Received():
            yield event.sender
            yield from event.recipients
            yield from (refusal.recipient for refusal in event.refused)
        case More():
            yield from event.recipients
        case Tried():
            for part in event.parts:
                yield from part.recipients
        case Remark():
            pass


def _cleared(reply: str, names: Iterable[str]) -> str:
    """Return a reply without addresses, and without the local parts of these."""
    if "@" in reply:
        reply = _ADDRESS.sub("...", reply)
    for name in names:
        local = name.rpartition("@")[0] or name
        if len(local) >= _SHORTEST and local.lower() in reply.lower():
            reply = re.sub(rf"(?<!\w){re.escape(local)}(?!\w)", "...", reply, flags=re.IGNORECASE)
        elif f"<{local}>" in reply:
            reply = reply.replace(f"<{local}>", _GONE)
    return reply


def is_hashed(address: str) -> bool:
    """Say whether an address is kept as a pseudonym."""
    return address.startswith(_MARK) and _HASHED.match(address) is not None


def shown(address: str) -> str:
    """Return an address as people see it: of a hashed one the domain."""
    return _HASHED.sub("*", address, count=1) if address.startswith(_MARK) else address
