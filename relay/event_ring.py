"""The last events of each process that are no success, in memory that all processes share, for whoever shows them.

As with the metrics (metric_store.py) a process writes only in its own region, and noting an event never fails and never
waits: what is not read in time is written over. What is torn by a write at that moment is left out.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from typing import Any

_SLOTS = 16  # events that a process remembers
_SIZE = 512  # octets of each
_CUT = 90  # characters of a field
_count = struct.Struct("=Q")
_length = struct.Struct("=H")
_REGION = _count.size + _SLOTS * _SIZE


class EventRing:
    """A region for each process: how many events there were, and the last ones."""

    def __init__(self, regions: int) -> None:
        """Make empty regions. Raises OSError without memory; what is not written takes none."""
        self._memory = memoryview(mmap.mmap(-1, regions * _REGION))
        self._own: memoryview | None = None

    def take(self, number: int | None) -> None:
        """Note events in this region from now on; None: nowhere."""
        self._own = None if number is None else self._of(number)

    def note(self, at: float, event: str, fields: Mapping[str, Any]) -> None:
        """Note an event of this process."""
        region = self._own
        if region is None:
            return
        words = {key: value if isinstance(value, int | float) else str(value)[:_CUT] for key, value in fields.items()}
        text = json.dumps([round(at, 3), event, words]).encode()
        if len(text) > _SIZE - _length.size:
            text = json.dumps([round(at, 3), event, {k: v for k, v in words.items() if k in _SHORT}]).encode()
        if len(text) <= _SIZE - _length.size:
            (number,) = _count.unpack_from(region)
            place = _count.size + number % _SLOTS * _SIZE
            _length.pack_into(region, place, len(text))
            region[place + _length.size : place + _length.size + len(text)] = text
            _count.pack_into(region, 0, number + 1)  # last: who reads finds it whole

    def since(self, seen: dict[int, int], regions: int) -> list[tuple[float, str, dict[str, Any]]]:
        """Return what the first regions have got since the last call with this ``seen``, which it brings up to date.

        The oldest comes first. Regions that nobody has are left alone: to look at one takes its memory.
        """
        found = []
        for region in range(regions):
            memory = self._of(region)
            (number,) = _count.unpack_from(memory)
            for n in range(max(seen.get(region, 0), number - _SLOTS), number):
                event = _event(memory, _count.size + n % _SLOTS * _SIZE)
                if event is not None:
                    found.append(event)
            seen[region] = number
        return sorted(found, key=lambda event: event[0])

    def _of(self, number: int) -> memoryview:
        return self._memory[number * _REGION : (number + 1) * _REGION]


_SHORT = {"id", "destination"}


def _event(memory: memoryview, place: int) -> tuple[float, str, dict[str, Any]] | None:
    (length,) = _length.unpack_from(memory, place)
    try:
        at, event, fields = json.loads(bytes(memory[place + _length.size : place + _length.size + length]))
        return float(at), str(event), dict(fields)
    except (ValueError, TypeError):
        return None
