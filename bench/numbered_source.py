"""A source of numbered mail at full speed that behaves as an MTA: what got no 2xx is sent again until it gets one.

Message ``n`` goes to ``n<n>.0@`` and perhaps more recipients, some of them are large, each carries a checksum of its
text. For every 2xx it appends ``<number> <mask of recipients> <smtp-dup's id>`` to its file, for a 5xx that it has
done nothing to deserve ``refused <text>``. Now and then it hangs up right after a dot. It makes nothing new when its
standard input ends, and ends itself once all is accepted: with 0, or with 1 when its patience is over.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import sys
import zlib
from contextlib import suppress

import uvloop

_SECONDS = 30.0  # for one answer; a client that waits longer than the relay's own deadlines
_PATIENCE = 120.0  # from the last new message until all are accepted
_ID = re.compile(rb"taken as (\w+)")
_HANGS_UP = 0.002
_LARGE = 0.004
_TEXT = b"".join(b"%06d the quick brown fox jumps over the lazy dog and never looks back\r\n" % n for n in range(6000))
_NOISE = random.Random(0).randbytes(300_000).hex().encode()


class Failed(Exception):
    """Something else than a 2xx."""


def message(number: int) -> tuple[bytes, int]:
    """Return the message of a number in wire form without its dot, and how many recipients it has."""
    source = random.Random(number)
    if source.random() < _LARGE:
        size = source.randrange(200_000, 600_000)
        text = b"".join(_NOISE[i : i + 76] + b"\r\n" for i in range(0, size, 76))
    else:
        size = source.choice((300, 1000, 2000, 4000, 12000))
        start = source.randrange(1000) * 70
        text = b"..dot %d\r\n" % number + _TEXT[start : start + size] + b"\r\n"
    head = b"Subject: %d\r\nMessage-ID: <%d@soak.example>\r\nX-Checksum: %08x\r\n\r\n"
    return head % (number, number, zlib.crc32(text)) + text, source.choice((1, 1, 1, 2, 3))


class Source:
    """What the sessions share: the next number, and the file."""

    def __init__(self, port: int, path: str, seed: int) -> None:
        self.port = port
        self.source = random.Random(seed)
        self.ending = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._next = 0

    def number(self) -> int | None:
        """Return the next number, None when there is none."""
        if self.ending:
            return None
        self._next += 1
        return self._next - 1

    def note(self, line: bytes) -> None:
        os.write(self._file, line + b"\n")


class Session:
    """One connection at a time, one message after the other."""

    def __init__(self, source: Source, *, pipelining: bool) -> None:
        self._source = source
        self._may_pipeline = pipelining
        self._pipelining = False
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def run(self) -> None:
        while (number := self._source.number()) is not None:
            body, recipients = message(number)
            owed = set(range(recipients))
            while owed:
                try:
                    owed -= await self._send(number, body, sorted(owed))
                except (Failed, OSError, TimeoutError, asyncio.IncompleteReadError):
                    self._hang_up()
                if owed:
                    await asyncio.sleep(self._source.source.uniform(0.05, 0.5))
        self._hang_up()

    async def _send(self, number: int, body: bytes, owed: list[int]) -> set[int]:
        """Send a message once; returns the recipients for whom it was accepted."""
        if self._writer is None:
            await self._connect()
        mail = b"MAIL FROM:<sender@soak.example>\r\n"
        rcpt = [b"RCPT TO:<n%d.%d@soak.example>\r\n" % (number, i) for i in owed]
        if self._pipelining:
            self._write(b"".join((mail, *rcpt, b"DATA\r\n")))
        begun = bool(await self._answer(b"" if self._pipelining else mail))
        accepted = set()
        for i, command in zip(owed, rcpt, strict=True) if begun or self._pipelining else ():
            # Behind a refused MAIL the rest of a pipeline is out of order, and so it is told.
            if await self._answer(b"" if self._pipelining else command, in_order=begun) and begun:
                accepted.add(i)
        if accepted or self._pipelining:
            go = await self._answer(b"" if self._pipelining else b"DATA\r\n", b"3", in_order=bool(accepted))
        if not accepted or not go:
            await self._answer(b"RSET\r\n")
            return set()
        self._write(body)
        assert self._writer is not None
        await asyncio.wait_for(self._writer.drain(), _SECONDS)
        self._write(b".\r\n")
        if self._source.source.random() < _HANGS_UP:
            raise Failed("we hung up")
        answer = await self._answer(b"")
        if not answer:
            return set()
        found = _ID.search(answer)
        self._source.note(b"%d %d %s" % (number, sum(1 << i for i in accepted), found[1] if found else b"-"))
        return accepted

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


async def send(port: int, path: str, sessions: int, seed: int) -> int:
    source = Source(port, path, seed)
    tasks = [asyncio.create_task(Session(source, pipelining=n % 2 == 0).run()) for n in range(sessions)]
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    source.ending = True
    _, late = await asyncio.wait(tasks, timeout=_PATIENCE)
    for task in tasks:
        if task not in late:
            task.result()  # a fault of ours is seen
    return 1 if late else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("file", help="where to note what was accepted")
    parser.add_argument("sessions", type=int)
    parser.add_argument("seed", type=int)
    given = parser.parse_args()
    sys.exit(uvloop.run(send(given.port, given.file, given.sessions, given.seed)))


if __name__ == "__main__":
    main()
