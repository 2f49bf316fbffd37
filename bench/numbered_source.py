"""A source of numbered mail at full speed that behaves as an MTA: what got no 2xx is sent again until it gets one.

Message ``n`` goes to ``n<n>.0@`` and perhaps more recipients, some of them are large, each carries a checksum of its
text. For every 2xx it appends ``<number> <mask of recipients> <smtp-dup's id>`` to its file, for a 5xx that it has
done nothing to deserve ``refused <text>``. Now and then it hangs up right after a dot. It makes nothing new when its
standard input ends or ``--count`` is reached, and ends itself once all is accepted: with 0, or with 1 when its
patience is over.
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
from functools import lru_cache
from pydoc_data import topics

import uvloop

from bench import content

_SECONDS = 30.0  # for one answer; a client that waits longer than the relay's own deadlines
_PATIENCE = 120.0  # from the last new message until all are accepted
_ID = re.compile(rb"taken as (\w+)")
_HANGS_UP = 0.002
_LARGE = 0.004
_LINES = [b"%06d the quick brown fox jumps over the lazy dog and never looks back\r\n" % n for n in range(1000)]
_NOISE = random.Random(0).randbytes(300_000).hex().encode()
_NO_LINE_ENDS = bytes(c if c not in b"\r\n\0" else 255 for c in range(256))
_VARIANTS = 500


class Failed(Exception):
    """Something else than a 2xx."""


def mixed(number: int, _size: int) -> tuple[bytes, int]:
    """Return a text of any size, with dots to be stuffed, and how many recipients it has."""
    source = random.Random(number)
    if source.random() < _LARGE:
        size = source.randrange(200_000, 600_000)
        text = b"".join(_NOISE[i : i + 76] + b"\r\n" for i in range(0, size, 76))
    else:
        lines = source.choice((4, 14, 28, 55, 160))
        start = source.randrange(len(_LINES) - lines)
        text = b"".join((b"..dot %d\r\n" % number, *_LINES[start : start + lines]))
    return text, source.choice((1, 1, 1, 2, 3))


@lru_cache(maxsize=1)
def _prose() -> list[bytes]:
    """Return some 10,000 lines of English: Python's own reference, which comes with every Python."""
    lines = "\n".join(topics.topics.values()).encode("ascii", "replace").splitlines()
    return [line.strip() + b"\r\n" for line in lines if not line.strip().startswith(b".")]


def text(number: int, size: int) -> tuple[bytes, int]:
    """Return ordinary text."""
    lines = _prose()
    start = random.Random(number).randrange(len(lines))
    found: list[bytes] = []
    left = size
    while left > 0:
        found.append(lines[(start + len(found)) % len(lines)])
        left -= len(found[-1])
    return b"".join(found), 1


@lru_cache(maxsize=_VARIANTS)
def _mail(variant: int, size: int) -> bytes:
    return content.wire(size, seed=variant)


def mail(number: int, size: int) -> tuple[bytes, int]:
    """Return the mail of the other benchmarks: half words, half base64."""
    return _mail(number % _VARIANTS, size), 1


def noise(number: int, size: int) -> tuple[bytes, int]:
    """Return what does not compress: 8-bit octets in lines."""
    octets = random.Random(number).randbytes(size).translate(_NO_LINE_ENDS)
    return b"".join(b" " + octets[i : i + 900] + b"\r\n" for i in range(0, size - size // 300 - 3, 900)), 1


KINDS = {"mixed": mixed, "text": text, "mail": mail, "noise": noise}


def message(number: int, kind: str, size: int) -> tuple[bytes, int]:
    """Return the message of a number in wire form without its dot, and how many recipients it has."""
    body, recipients = KINDS[kind](number, size)
    head = b"Subject: %d\r\nMessage-ID: <%d@soak.example>\r\nX-Checksum: %08x\r\n\r\n"
    return head % (number, number, zlib.crc32(body)) + body, recipients


class Source:
    """What the sessions share: the next number, and the file."""

    def __init__(self, port: int, path: str, seed: int, *, first: int, count: int, kind: str, size: int) -> None:
        self.port = port
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

    def message(self, number: int) -> tuple[bytes, int]:
        return message(number, self._kind, self._size)

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
            body, recipients = self._source.message(number)
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
        if not self._source.is_steady and self._source.source.random() < _HANGS_UP:
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
    given = parser.parse_args()
    source = Source(
        given.port, given.file, given.seed, first=given.first, count=given.count, kind=given.kind, size=given.size
    )
    sys.exit(uvloop.run(send(source, given.sessions)))


if __name__ == "__main__":
    main()
