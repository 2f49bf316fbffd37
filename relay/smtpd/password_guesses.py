"""Wrong passwords by the client's address, so that who guesses is not heard again for a while, on any connection.

A household (see identity) may be wrong so many times at once and now and then; beyond that no password is looked at
but one that was right before. What is kept is bounded: where too many are wrong the oldest are forgotten. Nothing here
fails.
"""

from __future__ import annotations

import time
from collections import OrderedDict

_MOST = 20  # wrong passwords of one household at once
_FORGIVEN = 10.0  # seconds, after which one is forgotten
_KEPT = 10_000  # households


class Guesses:
    """The wrong passwords that one process has heard."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how many there were, and when

    def _level(self, household: str) -> float:
        count, when = self._found.get(household, (0.0, 0.0))
        return max(0.0, count - (time.monotonic() - when) / _FORGIVEN)

    def are_too_many(self, household: str) -> bool:
        return self._level(household) >= _MOST

    def add(self, household: str) -> None:
        """Count a wrong password."""
        self._found[household] = (self._level(household) + 1, time.monotonic())
        self._found.move_to_end(household)
        if len(self._found) > _KEPT:
            self._found.popitem(last=False)
