"""What is tried again and again until it is done, with longer and longer pauses, and what the log says of that.

The trouble comes in few lines: when it begins, once a minute with a count, at its end. A loop that tries again every
second or two while Redis is away would else bury what an operator has to see.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_AGAIN_SECONDS = 60.0

T = TypeVar("T")


class Backoff:
    """Pauses between tries, in seconds: each twice as long as the one before, up to the longest."""

    def __init__(self, first: float, longest: float) -> None:
        self._first = self._pause = first
        self._longest = longest

    @property
    def is_at_first(self) -> bool:
        """Whether none has been taken since it last worked."""
        return self._pause == self._first

    def next(self) -> float:
        """Return the next pause."""
        pause, self._pause = self._pause, min(self._longest, self._pause * 2)
        return pause

    def reset(self) -> None:
        """Begin anew: it worked."""
        self._pause = self._first


async def until_done(attempt: Callable[[], Awaitable[T]], trouble: Callable[[Exception], None], pauses: Backoff) -> T:
    """Return what the first attempt returns that does not fail; ``trouble`` raises what should end this, too."""
    while True:
        try:
            done = await attempt()
        except Exception as error:
            trouble(error)
            await asyncio.sleep(pauses.next())
        else:
            pauses.reset()
            return done


class Repeated:
    """One kind of trouble of one loop. ``trouble`` and ``better`` write a line; both get words of ours."""

    def __init__(self, what: str, trouble: Callable[[str], None], better: Callable[[str], None]) -> None:
        self._what = what
        self._trouble = trouble
        self._better = better
        self._count = 0
        self._told_at = float("-inf")  # monotonic

    def came(self, reason: str) -> None:
        """Note that it came once more."""
        self._count += 1
        now = time.monotonic()
        if self._count == 1 or now - self._told_at >= _AGAIN_SECONDS:
            self._told_at = now
            times = f" ({self._count} times)" if self._count > 1 else ""
            self._trouble(f"{self._what}: {reason}{times}")

    def is_over(self) -> None:
        """Note that it did not come; says so if it had."""
        if self._count:
            self._better(f"{self._what}: over, after {self._count} times")
            self._count = 0
