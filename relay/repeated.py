"""Trouble that comes again and again, in few lines of the log: when it begins, once a minute with a count, at its end.

A loop that tries again every second or two while Redis is away would else bury what an operator has to see.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_AGAIN_SECONDS = 60.0


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
