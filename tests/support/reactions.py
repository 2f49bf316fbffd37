"""What a ScriptedServer can do instead of answering normally.

A *reaction* is one of: a str (a reply; several lines are separated by newlines and numbered properly), bytes
(sent as they are), one of the classes below, a tuple of reactions done in order, a list (one reaction per
occurrence, the last one for all that follow), None (the normal thing), or a callable of one argument, the
``Moment``, that returns any of these. So ``(gate, None)`` answers normally, but only after ``gate.open()``.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from support.waiting import PATIENCE

if TYPE_CHECKING:
    from support.recorded_sessions import Connection

Reaction: TypeAlias = (
    "str | bytes | Close | HalfClose | Reset | Silence | Delay | Trickle | Gate | tuple[Any, ...] | list[Any] "
    "| Callable[[Moment], Any] | None"
)


class Moment(NamedTuple):
    """What a callable in the script is told: the command line (without CRLF) and the connection."""

    line: str
    connection: Connection


@dataclass(frozen=True)
class Close:
    """Close the connection as a process that ends does: FIN, and RST for what comes later."""


@dataclass(frozen=True)
class HalfClose:
    """Send EOF, but go on reading and dropping, so that what was sent before certainly arrives."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection (RST)."""


@dataclass(frozen=True)
class Silence:
    """Never say anything again, nor read; the connection stays open until the server stops."""


@dataclass(frozen=True)
class Delay:
    """Wait this long, in seconds. Only for deadlines under test; to order events use a Gate."""

    seconds: float


@dataclass(frozen=True)
class Trickle:
    """Send the text octet by octet with a pause between them."""

    text: str | bytes
    seconds: float


@dataclass(eq=False)
class Gate:
    """Wait here until the test calls ``open``. Every connection that comes is counted in ``reached``."""

    _opened: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    _reached: concurrent.futures.Future[None] = field(default_factory=concurrent.futures.Future)
    reached: int = 0

    def open(self) -> None:
        """Let everybody pass, now and later."""
        if not self._opened.done():
            self._opened.set_result(None)

    def wait(self, timeout: float = PATIENCE) -> None:
        """Wait until somebody has reached the gate (for tests without an event loop)."""
        self._reached.result(timeout)

    async def arrival(self, timeout: float = PATIENCE) -> None:
        """Wait until somebody has reached the gate (for tests in an event loop)."""
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._reached)), timeout)

    async def pass_through(self) -> None:
        """Be the one who waits (the server calls this)."""
        self.reached += 1
        if not self._reached.done():
            self._reached.set_result(None)
        await asyncio.shield(asyncio.wrap_future(self._opened))


def wire(reply: str | bytes) -> bytes:
    """Return a reply as sent: ``250 a\\nb`` becomes two lines, each with the code of the first."""
    if isinstance(reply, bytes):
        return reply
    lines = reply.split("\n")
    code = lines[0][:3]
    texts = [lines[0][4:], *(line[4:] if line[:4] in {f"{code}-", f"{code} "} else line for line in lines[1:])]
    last = len(texts) - 1
    return b"".join(
        f"{code}{' ' if number == last else '-'}{text}\r\n".encode("utf-8", "surrogateescape")
        for number, text in enumerate(texts)
    )
