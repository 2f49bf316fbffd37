"""Whether mail comes so densely that its copies are better off in a job together than each by itself.

The copies of a job follow each other over few connections, and their outcomes are written together. At 700 messages a
second, first tries from memory took all processes a quarter more processor time; below 100 that is no matter, and a
copy is delivered a tenth of a second sooner.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from relay.ledger.rq_jobs import GATHER_SECONDS

MOST = 10  # messages of one relay process while a job gathers that are not dense


class Density:
    """How densely the messages of one relay process come."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_at = 0.0
        self._count = self._former = 0  # messages in this span of time, and in the one before

    def is_high(self) -> bool:
        """Count a message, and say whether it is one of too many."""
        spans = (self._clock() - self._begun_at) // GATHER_SECONDS
        if spans:
            self._begun_at += spans * GATHER_SECONDS
            self._former = self._count if spans == 1 else 0
            self._count = 0
        self._count += 1
        return max(self._count, self._former) > MOST
