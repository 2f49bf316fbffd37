"""A load of our own, for what smtp-source cannot do: messages at a given rate, the time of each, new recipients.

The rate is an open loop: a message has its time, and when no connection is free then, the waiting counts as part of
how long it took. MAIL, RCPT and DATA leave together where the server offers PIPELINING.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import uvloop

T = TypeVar("T")

_LIMIT = 1 << 16
_SECONDS = 120.0  # for one answer
_AGAIN = (0.1, 0.5)  # seconds until who was sent away is back


class Refused(Exception):
    """The server said something else than was hoped for."""


class Timing(NamedTuple):
    """One message: seconds from its time, and from its MAIL, until the answer to its dot."""

    since_due: float
    since_mail: float


@dataclass(slots=True)
class Connection:
    """One kept connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pipelining: bool = False
    size: bool = False

    @classmethod
    async def open(cls, port: int) -> Connection:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_LIMIT)
        self = cls(reader, writer)
        await self._expect(b"220")
        writer.write(b"EHLO bench.example.com\r\n")
        lines = await self._expect(b"250")
        words = {line[4:].split()[0].upper() for line in lines if line[4:].split()}
        self.pipelining, self.size = b"PIPELINING" in words, b"SIZE" in words
        return self

    async def send(self, sender: str, recipient: str, body: bytes) -> None:
        """Send one message in wire form. Raises Refused."""
        await self.begin(sender, recipient, len(body))
        self.writer.write(body)
        self.writer.write(b".\r\n")
        await self.writer.drain()
        await self._expect(b"250")

    async def begin(self, sender: str, recipient: str, size: int) -> None:
        """Get to the 354."""
        mail = b"MAIL FROM:<%s>" % sender.encode() + (b" SIZE=%d" % size if self.size else b"")
        commands = (mail + b"\r\n", b"RCPT TO:<%s>\r\n" % recipient.encode(), b"DATA\r\n")
        if self.pipelining:
            self.writer.write(b"".join(commands))
        for command, code in zip(commands, (b"250", b"250", b"354"), strict=True):
            if not self.pipelining:
                self.writer.write(command)
            await self._expect(code)

    async def finish(self) -> None:
        """Send the dot and hear the answer."""
        self.writer.write(b".\r\n")
        await self._expect(b"250")

    def close(self) -> None:
        self.writer.write(b"QUIT\r\n")
        self.writer.close()

    async def _expect(self, code: bytes) -> list[bytes]:
        lines = []
        async with asyncio.timeout(_SECONDS):
            while True:
                line = await self.reader.readline()
                lines.append(line)
                if line[3:4] != b"-":
                    break
        if not line.startswith(code):
            raise Refused(line.decode("utf-8", "replace").strip() or "the connection was closed")
        return lines


@dataclass(frozen=True, slots=True)
class Stream:
    """Messages at a rate (a second), at random moments, for so many seconds. ``recipient`` is called with a number."""

    port: int
    rate: float
    seconds: float
    body: bytes
    connections: int = 50
    sender: str = "a@example.com"
    recipient: Callable[[int], str] = lambda _: "b@example.com"
    seed: int = 1


class Streamed(NamedTuple):
    """What became of a stream: the times of what was accepted, and what was said about the rest."""

    timings: list[Timing]
    refused: list[str]
    seconds: float  # from the first message to the last answer


async def play(stream: Stream, watch: Callable[[float], None] | None = None) -> Streamed:
    """Send a stream. ``watch`` is called ten times a second with the seconds that have passed."""
    connections = await asyncio.gather(*(Connection.open(stream.port) for _ in range(stream.connections)))
    idle: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    for connection in connections:
        idle.put_nowait(connection)
    source = random.Random(stream.seed)
    result = Streamed([], [], 0.0)

    async def one(number: int, due: float) -> None:
        connection = await idle.get()
        begun = time.perf_counter()
        try:
            await connection.send(stream.sender, stream.recipient(number), stream.body)
        except (Refused, OSError, TimeoutError) as error:
            result.refused.append(str(error) or type(error).__name__)
            connection.close()
            connection = await Connection.open(stream.port)
        else:
            ended = time.perf_counter()
            result.timings.append(Timing(ended - due, ended - begun))
        idle.put_nowait(connection)

    begun = due = time.perf_counter()
    ticker = asyncio.create_task(_tick(watch, begun)) if watch else None
    tasks = set()
    try:
        number = 0
        while (due := due + source.expovariate(stream.rate)) < begun + stream.seconds:
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            # A timer may fire a little early; then its time is now.
            task = asyncio.create_task(one(number, min(due, time.perf_counter())))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.gather(*tasks)
    finally:
        if ticker:
            ticker.cancel()
    ended = time.perf_counter()
    for connection in connections:
        connection.close()
    return result._replace(seconds=ended - begun)


class Crowd(NamedTuple):
    """What became of a crowd: how often which answer sent somebody away for now, and what was said for good."""

    sent_away: Counter[str]
    refused: list[str]


async def all_at_once(port: int, body: bytes, clients: int, *, gather: float = 0.0) -> Crowd:
    """Have many clients send one message each at the same time. Who is answered 4xx tries again, as an MTA does.

    With ``gather`` each keeps its dot back until all have sent the rest, or so many seconds have passed.
    """
    left = clients
    refused: list[str] = []
    sent_away: Counter[str] = Counter()
    together = asyncio.Event()

    async def once() -> None:
        nonlocal left
        connection = await Connection.open(port)
        try:
            await connection.begin("a@example.com", "b@example.com", len(body))
            for start in range(0, len(body), _LIMIT):
                connection.writer.write(body[start : start + _LIMIT])
                await connection.writer.drain()
            left -= 1
            if left <= 0:
                together.set()
            if gather:
                with suppress(TimeoutError):
                    await asyncio.wait_for(together.wait(), gather)
            await connection.finish()
        finally:
            connection.close()

    async def one(number: int) -> None:
        source = random.Random(number)
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                return await once()
            except (Refused, OSError, TimeoutError) as error:
                text = str(error) or type(error).__name__
                if not text.startswith("4") or time.monotonic() > deadline:
                    refused.append(text)
                    return None
                sent_away[text] += 1
            await asyncio.sleep(source.uniform(*_AGAIN))

    await asyncio.gather(*(one(number) for number in range(clients)))
    return Crowd(sent_away, refused)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a load in this thread, on uvloop."""
    return uvloop.run(coroutine)


async def _tick(watch: Callable[[float], None], begun: float) -> None:
    while True:
        watch(time.perf_counter() - begun)
        await asyncio.sleep(0.1)
