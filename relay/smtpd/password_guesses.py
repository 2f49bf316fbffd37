"""Wrong passwords by network prefix of the client: too many, and its passwords are not checked for a while.

A prefix (see mail/addresses.py) may send 20 wrong passwords at once and one more every ten seconds; beyond that only
passwords that were right before are accepted, on any connection. The table is shared memory, made before the relay
processes are forked, so a guess counts for all of them. Its size is fixed: rarely, two prefixes share a slot and reach
the limit early. Two processes that write one slot at the same time may lose a count. Nothing here raises.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time

_MOST = 20  # wrong passwords from one prefix
_FORGIVEN = 10.0  # seconds, after which one is forgotten
_SLOTS = 1 << 16


class Guesses:
    """The wrong passwords that all relay processes have received."""

    def __init__(self) -> None:
        self._table = memoryview(mmap.mmap(-1, _SLOTS * 16)).cast("d")  # pairs: count, time of the last
        self._salt = os.urandom(16)  # so that no client can aim at the slot of another

    def _at(self, prefix: str) -> int:
        digest = hashlib.blake2b(prefix.encode(), digest_size=8, salt=self._salt).digest()
        return int.from_bytes(digest) % _SLOTS * 2

    def _level(self, at: int) -> float:
        # The monotonic clock is the same for all processes of a system.
        return max(0.0, self._table[at] - (time.monotonic() - self._table[at + 1]) / _FORGIVEN)

    def are_too_many(self, prefix: str) -> bool:
        return self._level(self._at(prefix)) >= _MOST

    def add(self, prefix: str) -> None:
        """Count a wrong password."""
        at = self._at(prefix)
        level = self._level(at)
        self._table[at + 1] = time.monotonic()
        self._table[at] = level + 1
