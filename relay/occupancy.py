"""How many clients and how many octets of messages all relay processes hold, so that limits count for them together.

A page of shared memory, made before the processes are forked: each writes only its own seat and reads all. A
process that dies leaves its numbers; the one that takes its seat starts with zeros.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

_FIELDS = 2  # clients, octets


class Occupancy:
    """The numbers of all seats."""

    def __init__(self, seats: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, max(1, seats) * _FIELDS * 8)).cast("q")

    def seat(self, index: int) -> Seat:
        """Return the seat of one process."""
        return Seat(self._numbers, index * _FIELDS)


@dataclass(slots=True)
class Seat:
    """One process's own numbers, and the sums of all."""

    _numbers: memoryview
    _at: int

    def take(self) -> None:
        """Start with zeros, whatever a predecessor left."""
        self._numbers[self._at] = self._numbers[self._at + 1] = 0

    @property
    def clients(self) -> int:
        return sum(self._numbers[0::_FIELDS])

    @property
    def octets(self) -> int:
        return sum(self._numbers[1::_FIELDS])

    def add_client(self, change: int) -> None:
        self._numbers[self._at] += change

    def add_octets(self, change: int) -> None:
        self._numbers[self._at + 1] += change
