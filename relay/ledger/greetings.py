"""What each server last said to EHLO, as the processes that talk to it have told the ledger: written off the mail path.

A process tells it when it is another than it told last, and once an hour; Redis being away delays that until the next
connection. What a server says is bounded and made printable, before it is written and again when it is read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.client.connection import Connection
from relay.ledger import keys
from relay.mail.stored import any_text, number, parsed
from relay.mail.text import printable

_MOST = 64  # extensions
_KEYWORD, _PARAMETERS = 40, 200  # characters of each
_AGAIN_SECONDS = 3600.0
_PAUSE_SECONDS = 10.0  # between two of one server: the nodes behind a name may differ, and each connection be another's
_LONGEST = 64 << 10  # octets of a stored form


@dataclass(frozen=True, slots=True)
class Greeting:
    """A server's last EHLO: keyword in capitals -> parameters; ``encrypted``: it came after STARTTLS, or in TLS."""

    extensions: Mapping[str, str] = field(default_factory=dict)
    encrypted: bool = False
    at: float = 0.0

    @property
    def offers_tls(self) -> bool:
        return self.encrypted or "STARTTLS" in self.extensions

    def to_json(self) -> str:
        return json.dumps({"at": round(self.at, 3), "tls": self.encrypted, "extensions": dict(self.extensions)})

    @classmethod
    def from_json(cls, data: str | bytes) -> Greeting:
        """Read the stored form. Raises ValueError for what is none."""
        if len(data) > _LONGEST:
            raise ValueError("no EHLO: it is too long")
        try:
            found = parsed(data)
            extensions = {any_text(key): any_text(value) for key, value in found["extensions"].items()}
            return cls(_bounded(extensions), bool(found["tls"]), number(found["at"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no EHLO: {printable(str(error))[:_PARAMETERS]}") from error


def _bounded(extensions: Mapping[str, str]) -> dict[str, str]:
    chosen = sorted(extensions.items())[:_MOST]
    return {_cut(key, _KEYWORD).upper(): _cut(value, _PARAMETERS) for key, value in chosen}


def _cut(text: str, most: int) -> str:
    return printable(text[:most])[:most]


class Greetings:
    """Tells the ledger what servers say to this process."""

    def __init__(self, connection: Redis) -> None:
        self._connection = connection
        self._told: dict[str, tuple[Mapping[str, str], bool, float]] = {}  # name -> what, and when (monotonic)
        self._telling: set[asyncio.Task[None]] = set()

    def note(self, connection: Connection) -> None:
        """Take a new connection's EHLO; whoever has opened it does not wait."""
        name, now = connection.destination.name, time.monotonic()
        extensions, encrypted, at = self._told.get(name, ({}, False, -_AGAIN_SECONDS))
        is_known = extensions == connection.extensions and encrypted == connection.is_encrypted
        if now - at < (_AGAIN_SECONDS if is_known else _PAUSE_SECONDS):
            return
        self._told[name] = (connection.extensions, connection.is_encrypted, now)
        said = Greeting(_bounded(connection.extensions), connection.is_encrypted, time.time())
        task = asyncio.get_running_loop().create_task(self._tell(name, said))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def close(self) -> None:
        """End what is under way; the client is closed after this, and a task that outlives it would connect again."""
        tasks = tuple(self._telling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, name: str, said: Greeting) -> None:
        try:
            await self._connection.set(keys.EHLO + name, said.to_json())
        except (RedisError, OSError) as error:
            self._told.pop(name, None)
            maillog.ledger_trouble("EHLO of a server", error)


def read(connection: Any, names: Iterable[str]) -> dict[str, Greeting]:
    """Return the last EHLO of those servers that have been talked to."""
    wanted = list(names)
    found: dict[str, Greeting] = {}
    pipe = connection.pipeline(transaction=False)
    for name in wanted:
        pipe.get(keys.EHLO + name)
    for name, data in zip(wanted, pipe.execute(raise_on_error=False), strict=True):
        try:
            if isinstance(data, bytes | str):
                found[name] = Greeting.from_json(data)
        except ValueError:
            continue
    return found
