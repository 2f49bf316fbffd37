"""A source of numbered mail at full speed that behaves as an MTA: what got no 2xx is sent again until it gets one.

What message ``n`` is says bench/numbered.py. For every 2xx it appends ``<number> <mask of recipients> <smtp-dup's id>``
to its file, ``unanswered <number> <mask>`` when it has sent all of a message and heard no 2xx, and for a 5xx that it
has done nothing to deserve ``refused <text>``. Now and then it hangs up right after a dot. It makes nothing new when
its standard input ends or ``--count`` is reached, and ends itself once all is accepted: with 0, or with 1 when its
patience is over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sys
from contextlib import suppress

import uvloop

from bench.numbered import KINDS, Mail, compose

_SECONDS = 30.0  # for one answer; a client that waits longer than the relay's own deadlines
_PATIENCE = 120.0  # from the last new message until all are accepted
_ID = re.compile(rb"taken as (\w+)")
_HANGS_UP = 0.002
_NEEDED = {b"BODY=8BITMIME": b"8BITMIME", b"SMTPUTF8": b"SMTPUTF8"}  # what a parameter asks of the relay


class Failed(Exception):
    """Something else than a 2xx."""


class Source:
    """What the sessions share: the next number, and the file."""

    def __init__(
        self, port: int, path: str, seed: int, *, first: int, count: int, kind: str, size: int, rate: float = 0.0
    ) -> None:
        self.port = port
        self._pause = 1 / rate if rate else 0.0
        self._due = 0.0
        self.source = random.Random(seed)
        self.ending = False
        self.is_steady = bool(count)  # it is counted: nothing is done at random
        self._kind, self._size = kind, size
        self._next, self._end = first, first + count if count else sys.maxsize
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def number(self) -> int | None:
        """Return the next number, None when there is none."""
        if self.ending or self._next >= self._end:
            return None
        self._next += 1
        return self._next - 1

    async def wait_for_turn(self) -> None:
        """Wait until the next message is due by the rate."""
        if self._pause:
            now = asyncio.get_running_loop().time()
            self._due = max(self._due + self._pause, now)
            await asyncio.sleep(self._due - now)

    def message(self, number: int) -> Mail:
        return compose(number, self._kind, self._size)

    def note(self, line: bytes) -> None:
        os.write(self._file, line + b"\n")


class Session:
    """One connection at a time, one message after the other."""

    def __init__(self, source: Source, *, pipelining: bool) -> None:
        self._source = source
        self._may_pipeline = pipelining
        self._pipelining = False
        self._offered = b""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        while (number := self._source.number()) is not None:
            await self._source.wait_for_turn()
            mail = self._source.message(number)
            owed = set(range(len(mail.recipients)))
            while owed:
                try:
                    owed -= await self._send(number, mail, sorted(owed))
                except (Failed, OSError, TimeoutError, asyncio.IncompleteReadError):
                    self._hang_up()
                if owed:
                    await asyncio.sleep(self._source.source.uniform(0.05, 0.5))
        self._hang_up()

    async def _send(self, number: int, mail: Mail, owed: list[int]) -> set[int]:
        """Send a message once; returns the recipients for whom it was accepted."""
        if self._writer is None:
            await self._connect()
        if any(_NEEDED[parameter] not in self._offered for parameter in mail.parameters):
            raise Failed("it does not offer now what this message needs")
        in_chunks = mail.is_chunked and b"CHUNKING" in self._offered
        pipelining = self._pipelining and not in_chunks
        begin = b" ".join((b"MAIL FROM:<%s>" % mail.sender, *mail.parameters)) + b"\r\n"
        rcpt = [b"RCPT TO:<%s>\r\n" % mail.recipients[i] for i in owed]
        if pipelining:
            self._write(b"".join((begin, *rcpt, b"DATA\r\n")))
        begun = bool(await self._answer(b"" if pipelining else begin))
        accepted = set()
        for i, command in zip(owed, rcpt, strict=True) if begun or pipelining else ():
            # Behind a refused MAIL the rest of a pipeline is out of order, and so it is told.
            if await self._answer(b"" if pipelining else command, in_order=begun) and begun:
                accepted.add(i)
        if in_chunks:
            last = await self._chunks(mail.unstuffed) if accepted else None
        elif accepted or pipelining:
            go = await self._answer(b"" if pipelining else b"DATA\r\n", b"3", in_order=bool(accepted))
            last = b".\r\n" if accepted and go else None
        else:
            last = None
        if last is None:
            await self._answer(b"RSET\r\n")
        elif await self._finish(number, accepted, b"" if in_chunks else mail.wire, last):
            return accepted
        return set()

    async def _finish(self, number: int, accepted: set[int], wire: bytes, last: bytes) -> bool:
        """Send what is left, and note what is said to it."""
        mask = sum(1 << i for i in accepted)
        self._write(wire)
        await self._drained()
        answer = b""
        try:
            self._write(last)
            if not self._source.is_steady and self._source.source.random() < _HANGS_UP:
                raise Failed("we hung up")
            answer = await self._answer(b"")
        finally:
            if not answer:
                self._source.note(b"unanswered %d %d" % (number, mask))
        if answer:
            found = _ID.search(answer)
            self._source.note(b"%d %d %s" % (number, mask, found[1] if found else b"-"))
        return bool(answer)

    async def _chunks(self, octets: bytes) -> bytes | None:
        """Send all but the last chunk; returns that with its command, None when a chunk was refused."""
        most = max(1, len(octets) // self._source.source.choice((1, 2, 5)))
        at = 0
        while len(octets) - at > most:
            self._write(b"BDAT %d\r\n%s" % (most, octets[at : at + most]))
            await self._drained()
            if not await self._answer(b""):
                return None
            at += most
        return b"BDAT %d LAST\r\n%s" % (len(octets) - at, octets[at:])

    async def _drained(self) -> None:
        assert self._writer is not None
        await asyncio.wait_for(self._writer.drain(), _SECONDS)

    async def _connect(self) -> None:
        self._reader, self._writer = await asyncio.wait_for(
            asyncio.open_connection("127.0.0.1", self._source.port, limit=1 << 16), 10
        )
        self._pipelining = False
        if not await self._answer(b""):
            raise Failed
        hello = await self._answer(b"EHLO soak.example\r\n")
        if not hello:
            raise Failed
        self._offered = hello
        self._pipelining = self._may_pipeline and b"PIPELINING" in hello

    def _write(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)

    async def _answer(self, command: bytes, good: bytes = b"2", *, in_order: bool = True) -> bytes:
        """Return a good answer, b"" for a bad one. Raises Failed when it ends the connection."""
        if command:
            self._write(command)
        assert self._reader is not None
        lines = []
        async with asyncio.timeout(_SECONDS):
            while True:
                line = await self._reader.readuntil(b"\n")
                lines.append(line)
                if line[3:4] != b"-":
                    break
        if line.startswith(good):
            return b"".join(lines)
        if in_order and not line.startswith(b"4"):
            self._source.note(b"refused " + line.strip())
        if line.startswith(b"421"):
            raise Failed(line.decode())
        return b""

    def _hang_up(self) -> None:
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._reader = self._writer = None


async def _until_told(source: Source) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    source.ending = True


async def send(source: Source, sessions: int) -> int:
    tasks = {asyncio.create_task(Session(source, pipelining=n % 2 == 0).run()) for n in range(sessions)}
    told = asyncio.create_task(_until_told(source))
    while tasks and not source.ending:
        done, _ = await asyncio.wait({*tasks, told}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & tasks:
            task.result()  # a fault of ours is seen
        tasks -= done
    if tasks:
        done, tasks = await asyncio.wait(tasks, timeout=_PATIENCE)
        for task in done:
            task.result()
    told.cancel()
    return 1 if tasks else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("file", help="where to note what was accepted")
    parser.add_argument("sessions", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--first", type=int, default=0, help="the first number")
    parser.add_argument("--count", type=int, default=0, help="how many numbers; 0: until standard input ends")
    parser.add_argument("--kind", choices=KINDS, default="mixed")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rate", type=float, default=0.0, help="messages a second; 0: as fast as it goes")
    given = parser.parse_args()
    source = Source(
        given.port,
        given.file,
        given.seed,
        first=given.first,
        count=given.count,
        kind=given.kind,
        size=given.size,
        rate=given.rate,
    )
    sys.exit(uvloop.run(send(source, given.sessions)))


if __name__ == "__main__":
    main()
