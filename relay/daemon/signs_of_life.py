"""The sign of life of a child: one that is stopped, or hangs in what never returns, gives none.

A child gives one once a second (relay.child) from the loop that does its work, in memory that it shares with the
supervisor. Nobody else would notice: a worker that stands still keeps its copies from all others, a relay the clients
that the kernel gives it. Its end harms nothing that a crash would. Only time counts in which the supervisor itself was
awake: a machine that was suspended makes nobody dead. Without a first sign nobody is judged.
"""

from __future__ import annotations

import mmap
import time

LOOK_SECONDS = 10.0  # between two looks at them


class SignOfLife:
    """The count of one child's signs, and for how long it has been the same."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._count = memoryview(self._memory).cast("Q")
        self._seen = 0
        self._looked_at = time.monotonic()
        self.silent = 0.0  # seconds

    def give(self) -> None:
        """Say that this child does its work (in the child)."""
        self._count[0] += 1

    def look(self) -> float:
        """Return for how many seconds no sign has come, as far as the supervisor was awake to see one."""
        now, count = time.monotonic(), self._count[0]
        if count != self._seen or not count:
            self.silent = 0.0
        else:
            self.silent += min(now - self._looked_at, 2 * LOOK_SECONDS)
        self._seen, self._looked_at = count, now
        return self.silent

    def close(self) -> None:
        """Give the memory back."""
        self._count.release()
        self._memory.close()
