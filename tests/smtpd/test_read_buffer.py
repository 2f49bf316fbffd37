"""The read buffer: lines and chunks are the same however the octets are split."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.smtpd.read_buffer import BUFFER, ReadBuffer

T = TypeVar("T")


class Tap:
    """Where the octets come from, as far as an Inbox knows it: it can be stopped, and then nothing may come."""

    def __init__(self) -> None:
        self.open = True
        self.turns = 0
        self.closing = False

    def pause_reading(self) -> None:
        assert self.open
        self.open = False
        self.turns += 1

    def resume_reading(self) -> None:
        assert not self.open
        assert not self.closing
        self.open = True

    def is_closing(self) -> bool:
        return self.closing


def in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def filled(*pieces: bytes, end: bool = False) -> ReadBuffer:
    inbox = ReadBuffer(asyncio.get_running_loop())
    for piece in pieces:
        inbox.feed(piece)
    if end:
        inbox.end()
    return inbox


async def fed(inbox: ReadBuffer, pieces: list[bytes], tap: Tap | None = None) -> int:
    """Feed an inbox piece by piece, each in a turn of the loop of its own, and the end; returns the most it kept."""
    most = 0
    for piece in pieces:
        while tap is not None and not tap.open:
            await asyncio.sleep(0)
        inbox.feed(piece)
        most = max(most, len(inbox.data))
        await asyncio.sleep(0)
    inbox.end()
    return most


@st.composite
def cut(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    """Return octets with many line ends among them, whole and in pieces."""
    data = draw(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b".", b"x", b"NOOP\r\n"]), max_size=40).map(b"".join))
    edges = [0, *sorted(draw(st.lists(st.integers(0, len(data)), max_size=12))), len(data)]
    return data, [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


@settings(deadline=None)
@given(cut())
def test_lines(given_: tuple[bytes, list[bytes]]) -> None:
    """Lines end at LF, and nowhere else; what has no end at the end of input is no line."""

    async def read() -> list[bytes]:
        inbox = filled()
        feeding = asyncio.ensure_future(fed(inbox, given_[1]))
        lines = []
        while (line := await inbox.line()) is not None:
            lines.append(line)
        await feeding
        return lines

    assert in_loop(read()) == [line + b"\n" for line in given_[0].split(b"\n")[:-1]]


@settings(deadline=None)
@given(cut(), st.lists(st.sampled_from(["line", "read", "three", "unread", "look"]), max_size=30))
def test_any_order(given_: tuple[bytes, list[bytes]], steps: list[str]) -> None:
    """Lines, chunks, octets put back and looking ahead: nothing is lost, repeated, or out of order."""

    async def read() -> bytes:
        inbox = filled()
        feeding = asyncio.ensure_future(fed(inbox, given_[1]))
        got = b""
        for step in steps:
            if step == "line":
                got += await inbox.line() or b""
            elif step == "look":
                ahead = list(inbox.lines_ahead())
                assert inbox.has_line == bool(ahead)
                assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in ahead)
                assert inbox.data or not ahead
            else:
                piece = await inbox.read(-1 if step == "read" else 3)
                assert len(piece) <= 3 or step == "read"
                if step == "unread":
                    inbox.unread(piece)
                else:
                    got += piece
        while piece := await inbox.read():
            got += piece
        await feeding
        return got

    assert in_loop(read()) == given_[0]


@pytest.mark.parametrize("size", [BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER, 3 * BUFFER, 10 * BUFFER])
@pytest.mark.parametrize("piece", [1 << 10, 1 << 16, 1 << 18, 1 << 30])
def test_a_huge_line(size: int, piece: int) -> None:
    """A line longer than the buffer is one empty line, however it comes, and the next one is whole; it is not kept."""

    async def read() -> tuple[list[bytes | None], int]:
        inbox, tap = filled(), Tap()
        inbox.follow(tap)
        data = b"x" * (size - 1) + b"\nNOOP\n"
        feeding = asyncio.ensure_future(fed(inbox, [data[i : i + piece] for i in range(0, len(data), piece)], tap))
        return [await inbox.line() for _ in range(3)], await feeding

    lines, most = in_loop(read())
    assert most <= BUFFER + 2 * min(piece, len(b"x" * size + b"NOOP\n"))
    assert lines == [b"x" * (size - 1) + b"\n" if size <= BUFFER else b"", b"NOOP\n", None]


def test_a_flood_is_stopped() -> None:
    """What nobody reads stops at twice the buffer, and goes on when it has been read: all of it, in order."""

    async def read() -> None:
        inbox, tap = filled(), Tap()
        inbox.follow(tap)
        data = random.Random(1).randbytes(20 * BUFFER)
        feeding = asyncio.ensure_future(fed(inbox, [data[i : i + 5000] for i in range(0, len(data), 5000)], tap))
        for _ in range(200):
            await asyncio.sleep(0)
        assert not tap.open
        assert not feeding.done()
        got = b""
        while piece := await inbox.read(700):
            got += piece
            assert len(inbox.data) <= 2 * BUFFER + 5000
            await asyncio.sleep(0)  # it comes faster than it is read
        assert got == data
        assert tap.open
        assert tap.turns > 10
        await feeding

    in_loop(read())


def test_who_waits_has_it_go_on() -> None:
    """Whoever waits for more than is here has the client read from again, though much is here: nothing stands still."""

    async def read() -> None:
        inbox, tap = filled(), Tap()
        inbox.follow(tap)
        inbox.feed(b"x" * (2 * BUFFER + 1))
        assert not tap.open
        waiting = asyncio.ensure_future(inbox.readexactly(2 * BUFFER + 2))
        await asyncio.sleep(0)
        assert tap.open
        inbox.feed(b"y")
        assert (await waiting)[-2:] == b"xy"

    in_loop(read())


def test_a_transport_that_closes_is_left_alone() -> None:
    """A transport on its way out, or gone, is not told to read on; what it brought can be read."""

    async def read() -> None:
        for gone in (False, True):
            inbox, tap = filled(), Tap()
            inbox.follow(tap)
            inbox.feed(b"x" * (2 * BUFFER) + b"\nlast\n")
            assert not tap.open
            tap.closing = True
            if gone:
                inbox.follow(None)
                inbox.end()
            assert await inbox.line() == b""
            assert await inbox.line() == b"last\n"
            assert not tap.open

    in_loop(read())


def test_the_end() -> None:
    """At the end of input what is here is still read; then lines are None, chunks empty, and nothing comes behind."""

    async def read() -> None:
        inbox = filled(b"a\nb", end=True)
        inbox.feed(b"c\n")
        assert await inbox.line() == b"a\n"
        assert await inbox.line() is None
        assert await inbox.read() == b"b"
        assert await inbox.read() == b""
        assert await inbox.line() is None
        with pytest.raises(asyncio.IncompleteReadError):
            await inbox.readexactly(1)
        with pytest.raises(asyncio.IncompleteReadError):
            await inbox.readuntil(b"\n")

    in_loop(read())


def test_giving_up() -> None:
    """Whoever gives up waiting leaves what has come, and what comes, to the next."""

    async def read() -> None:
        inbox = filled()
        first = asyncio.ensure_future(inbox.line())
        await asyncio.sleep(0)
        inbox.feed(b"x")
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        inbox.feed(b"y\n")
        assert await inbox.line() == b"xy\n"
        second = asyncio.ensure_future(inbox.line())
        await asyncio.sleep(0)
        inbox.end()
        assert await second is None

    in_loop(read())


def test_forgotten_while_waiting() -> None:
    """What is forgotten cannot be read, and ends the waiting with the end."""

    async def read() -> None:
        inbox = filled(b"line\nhalf a li")
        assert await inbox.line() == b"line\n"
        waiting = asyncio.ensure_future(inbox.line())
        await asyncio.sleep(0)
        assert inbox.clear() == b"half a li"
        inbox.end()
        assert await waiting is None
        assert not inbox.data

    in_loop(read())


def test_a_stream_for_headers() -> None:
    """Exactly so many octets, or all up to a separator, and what is behind it stays; one without end is given up."""

    async def read() -> None:
        inbox = filled(b"PROX", b"Y TCP4\r", b"\nEHLO x\r\n")
        assert await inbox.readexactly(5) == b"PROXY"
        assert await inbox.readexactly(0) == b""
        assert await inbox.readuntil() == b" TCP4\r\n"
        assert list(inbox.lines_ahead()) == [b"EHLO x\r\n"]
        with pytest.raises(asyncio.IncompleteReadError):
            await filled(b"x" * (BUFFER + 1)).readuntil()

    in_loop(read())


def test_what_is_unread_is_counted() -> None:
    """More than a few commands count while they are here, however they leave; in the end nothing is counted."""

    async def run() -> None:
        counted = [0]

        def count(octets: int) -> None:
            counted[0] += octets

        buffer = ReadBuffer(asyncio.get_running_loop(), count)
        buffer.feed(b"NOOP\r\n")
        assert counted == [0]
        buffer.feed(b"NOOP\r\n" * 50_000)
        assert counted == [300_006]
        await buffer.line()
        assert counted == [300_000]
        await buffer.read(100_000)
        assert counted == [200_000]
        await buffer.read()
        assert counted == [0]
        buffer.unread(b"x" * 40_000)
        assert counted == [40_000]
        buffer.clear()
        assert counted == [0]

    in_loop(run())


_PIECES = [
    b"\n",
    b"\r\n",
    b"x",
    b"NOOP\r\n",
    b"RSET\r\nQU",
    b"\0\n.\r",
    b"x" * 20_000,
    b"y" * BUFFER + b"\n",
    b"z" * 3 * BUFFER,
]
_STEPS = {"feed": 8, "line": 4, "chunk": 3, "at hand": 2, "give up": 2, "put back": 1}  # and how often


class _Model:
    """What the buffer should do, in the plainest way: one string of unread octets, and what is waited for."""

    def __init__(self) -> None:
        self.unread, self.ended = b"", False
        self.wanted: int | str | None = None
        self.is_too_long = False

    def answer(self) -> tuple[bool, bytes | None]:
        """Return whether the waiter has its answer now, and that."""
        if isinstance(self.wanted, int):
            if not self.unread and not self.ended:
                return False, None
            most = len(self.unread) if self.wanted < 0 else self.wanted
            found, self.unread = self.unread[:most], self.unread[most:]
            return True, found
        if (end := self.unread.find(b"\n") + 1) > 0:
            found, self.unread = self.unread[:end], self.unread[end:]
            return True, b"" if self.is_too_long or end > BUFFER else found
        if len(self.unread) > BUFFER:
            self.unread, self.is_too_long = b"", True
        return self.ended, None


class _Trial:
    """A buffer beside its model."""

    def __init__(self) -> None:
        self.model, self.tap = _Model(), Tap()
        self.counted = 0
        self.buffer = ReadBuffer(asyncio.get_running_loop(), self._count)
        self.buffer.follow(self.tap)
        self.waiter: asyncio.Future[bytes | None] | None = None
        self.last = b""

    def _count(self, octets: int) -> None:
        self.counted += octets

    def take(self, step: str, chance: random.Random) -> None:
        """Take a step, if it is possible now: one waits at a time, and a stopped client sends nothing."""
        if step == "feed" and self.tap.open:
            data = b"".join(chance.choices(_PIECES, k=chance.randint(1, 3)))
            self.buffer.feed(data)
            self.model.unread += b"" if self.model.ended else data
        elif step == "end":
            self.buffer.end()
            self.model.ended = True
        elif self.waiter is None:
            self._read(step, chance.choice([-1, 1, 3, BUFFER]))
        elif step == "give up" and not self.model.is_too_long:
            self.waiter.cancel()
            self.waiter = self.model.wanted = None

    def _read(self, step: str, most: int) -> None:
        model = self.model
        if step == "line":
            self.waiter, model.wanted = self.buffer.line(), step
        elif step == "chunk":
            self.waiter, model.wanted = self.buffer.chunk(most), most
        elif step == "put back":
            self.buffer.unread(self.last)
            model.unread, self.last = self.last + model.unread, b""
        elif step == "at hand":
            end = model.unread.find(b"\n") + 1
            found, model.unread = model.unread[:end], model.unread[end:]
            assert self.buffer.next_line() == ((found if end <= BUFFER else b"") if end else None)

    def compare(self) -> None:
        model = self.model
        if self.waiter is not None:
            is_answered, answer = model.answer()
            assert self.waiter.done() == is_answered
            assert self.tap.open or is_answered, "whoever waits has the client read from"
            if is_answered:
                assert self.waiter.result() == answer
                self.last, self.waiter = answer or b"", None
                model.wanted, model.is_too_long = None, False
        assert self.buffer.data[self.buffer._at :] == model.unread
        assert self.counted == (len(model.unread) if len(model.unread) > 1 << 14 else 0)
        assert self.tap.open or len(model.unread) > BUFFER


@pytest.mark.parametrize("seed", range(4))
def test_it_does_as_the_plainest_buffer_would(seed: int) -> None:
    """In any order of input, reads, reads given up and octets put back: the answers, what counts, who may send."""
    chance = random.Random(seed)

    async def run() -> None:
        for _ in range(100):
            trial = _Trial()
            steps = chance.choices(list(_STEPS), list(_STEPS.values()), k=40)
            for step in [*steps, "end", *("line", "chunk") * 4]:
                trial.take(step, chance)
                await asyncio.sleep(0)
                trial.compare()

    in_loop(run())
