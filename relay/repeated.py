"""Repeats an operation until it succeeds, with growing pauses, and limits the log lines about its failures.

A failure is logged when it begins, once a minute with a count, and at its end. Otherwise a loop that tries every second
or two while Redis is down would bury everything else in the log.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_AGAIN_SECONDS = 60.0

T = TypeVar("T")


class Backoff:
    """Pauses between tries, in seconds: each is twice as long as the one before, up to ``longest``."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = self._pause = first
        self._longest = longest

    @property
    def is_at_first(self) -> bool:
        """Whether no pause has been taken since the last success."""
        return self._pause == self._first

    def next(self) -> float:
        """Return the next pause."""
        pause, self._pause = self._pause, min(self._longest, self._pause * 2)
        return pause

    def reset(self) -> None:
        """Start again with the first pause, after a success."""
        self._pause = self._first


async def until_done(attempt: Callable[[], Awaitable[T]], trouble: Callable[[Exception], None], pauses: Backoff) -> T:
    """Repeat ``attempt`` until it succeeds and return its result; ``trouble`` gets each exception, and may raise it."""
    while True:
        try:
            done = await attempt()
        except Exception as error:
            trouble(error)
            await asyncio.sleep(pauses.next())
        else:
            pauses.reset()
            return done


class Seldom:
    """Failures that nobody says the end of, of many kinds: each kind is logged once a minute, with a count."""

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[float, int]] = {}  # when it was told last, and how often it came since

    def times(self, kind: str) -> int:
        """Return how many failures of a kind, this one included, a line is to be logged for now; 0 for no line."""
        now = time.monotonic()
        told_at, count = self._kinds.get(kind, (-math.inf, 0))
        is_due = now - told_at >= _AGAIN_SECONDS
        self._kinds[kind] = (now, 0) if is_due else (told_at, count + 1)
        return count + 1 if is_due else 0


class Repeated:
    """One kind of failure of one loop. ``trouble`` and ``better`` are called with the text of a log line."""

    def __init__(self, what: str, trouble: Callable[[str], None], better: Callable[[str], None]) -> None:
        self._what = what
        self._trouble = trouble
        self._better = better
        self._count = 0
        self._told_at = float("-inf")  # monotonic

    def came(self, reason: str) -> None:
        """Note a failure; logs it if it is the first, or the last line is over a minute old."""
        self._count += 1
        now = time.monotonic()
        if self._count == 1 or now - self._told_at >= _AGAIN_SECONDS:
            self._told_at = now
            times = f" ({self._count} times)" if self._count > 1 else ""
            self._trouble(f"{self._what}: {reason}{times}")

    def is_over(self) -> None:
        """Note a success; logs the end of the failures, if there were any."""
        if self._count:
            self._better(f"{self._what}: over, after {self._count} time{'s' * (self._count > 1)}")
            self._count = 0
