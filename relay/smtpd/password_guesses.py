"""Wrong passwords by the client's address, so that who guesses is not heard again for a while, on any connection.

The clients of one network prefix (see addresses) may be wrong so many times at once and now and then; beyond that no
password is looked at but one that was right before. The table is shared memory, made before the relay processes are
forked: a guess counts for all of them. It has a fixed size, and some prefixes share a slot by chance: seldom, and then
a limit is reached too early. Two processes that write one slot at the same time may lose a count. Nothing here fails.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import time

_MOST = 20  # wrong passwords of one prefix at once
_FORGIVEN = 10.0  # seconds, after which one is forgotten
_SLOTS = 1 << 16


class Guesses:
    """The wrong passwords that all relay processes have heard."""

    def __init__(self) -> None:
        self._table = memoryview(mmap.mmap(-1, _SLOTS * 16)).cast("d")  # how many there were, and when
        self._salt = os.urandom(16)  # nobody can choose whom to share a slot with

    def _at(self, prefix: str) -> int:
        digest = hashlib.blake2b(prefix.encode(), digest_size=8, salt=self._salt).digest()
        return int.from_bytes(digest) % _SLOTS * 2

    def _level(self, at: int) -> float:
        # The clock is the same for all processes of a system.
        return max(0.0, self._table[at] - (time.monotonic() - self._table[at + 1]) / _FORGIVEN)

    def are_too_many(self, prefix: str) -> bool:
        return self._level(self._at(prefix)) >= _MOST

    def add(self, prefix: str) -> None:
        """Count a wrong password."""
        at = self._at(prefix)
        level = self._level(at)
        self._table[at + 1] = time.monotonic()
        self._table[at] = level + 1
