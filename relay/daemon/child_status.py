"""Which children run, stand still, or die again and again: told by the supervisor in memory that all its forks share.

A reader that meets a half-written text reads again; what cannot be read for long is said to be unknown.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Iterable
from typing import Any

from relay.daemon.slots import HEALTHY, IN_A_LOOP, Slot

_SIZE = 1 << 20  # octets; what is not written takes no memory
_head = struct.Struct("=II")  # a count that is odd while the text is being written, and the text's length
_TRIES = 50


class ChildStatus:
    """What the supervisor tells of its children."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self._count = 0
        self._told = b""

    def tell(self, slots: Iterable[Slot]) -> None:
        """Note how the children are now."""
        seen = list(slots)
        failing = {s.child.name: (s.process is not None, s.started) for s in seen if s.deaths >= IN_A_LOOP}
        living: dict[str, list[str]] = {}
        for slot in seen:
            if slot.process is not None and slot.instance is not None:
                living.setdefault(slot.child.name, []).append(slot.instance)
        still = {s.child.name: s.process.pid for s in seen if s.process is not None and s.stands_still}
        text = json.dumps([failing, living, still]).encode()
        if text != self._told and _head.size + len(text) <= _SIZE:
            self._count += 1
            _head.pack_into(self._memory, 0, self._count, 0)
            self._memory[_head.size : _head.size + len(text)] = text
            self._count += 1
            _head.pack_into(self._memory, 0, self._count, len(text))
            self._told = text

    def failing(self, prefix: str) -> list[str]:
        """Return the children with such names that have died several times in a row, and have not lived long since."""
        failing: dict[str, tuple[bool, float]] = (self._read() or ({}, {}, {}))[0]
        now = time.monotonic()
        return sorted(
            n for n, (up, since) in failing.items() if n.startswith(prefix) and (not up or now - since < HEALTHY)
        )

    def still(self, prefix: str = "") -> list[str]:
        """Return the children with such names that live and do nothing, each with its process."""
        still: dict[str, int] = (self._read() or ({}, {}, {}))[2]
        return sorted(f"{name} (process {pid})" for name, pid in still.items() if name.startswith(prefix))

    def living(self, name: str) -> frozenset[str] | None:
        """Return the instances of a child's name that run; None when that cannot be told now."""
        found = self._read()
        return None if found is None else frozenset(found[1].get(name, ()))

    def _read(self) -> Any:
        for _ in range(_TRIES):
            count, length = _head.unpack_from(self._memory, 0)
            text = self._memory[_head.size : _head.size + length]
            if count % 2 == 0 and _head.unpack_from(self._memory, 0)[0] == count:
                return json.loads(text) if text else ({}, {}, {})
            time.sleep(0.001)
        return None
