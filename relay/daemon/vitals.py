"""Which children die again and again: told by the supervisor, read by the housekeeping, in memory that they share."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterable

from relay.daemon.slots import HEALTHY, IN_A_LOOP, Slot


class Vitals:
    """Which children die again and again, told by the supervisor in memory that all its forks share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)

    def tell(self, slots: Iterable[Slot]) -> None:
        told = {s.child.name: (s.process is not None, s.started) for s in slots if s.deaths >= IN_A_LOOP}
        text = json.dumps(told).encode()
        if len(text) + 4 <= len(self._memory):
            self._memory[:4] = bytes(4)
            self._memory[4 : 4 + len(text)] = text
            self._memory[:4] = len(text).to_bytes(4, "big")

    def failing(self, prefix: str) -> list[str]:
        """Return the children with such names that have died several times in a row, and have not lived long since."""
        size = int.from_bytes(self._memory[:4], "big")
        try:
            told = json.loads(self._memory[4 : 4 + size] or b"{}")
        except ValueError:  # it is being written
            return []
        now = time.monotonic()
        return sorted(
            n for n, (up, since) in told.items() if n.startswith(prefix) and (not up or now - since < HEALTHY)
        )
