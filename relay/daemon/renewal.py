"""A renewal: children of new settings come up beside those that run, and take their place, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from relay.daemon.slots import Child, Slot

Roster = Callable[[], Sequence[Child] | None]

SECONDS = 30.0  # for all new children to be ready


@dataclass(slots=True)
class Renewal:
    """The children of a generation; ``ended`` is called once: with "" when they have taken over, else with why not."""

    generation: int
    children: Sequence[Child]
    roster: Roster | None
    ended: Callable[[str], None]
    seconds: float = SECONDS
    slots: list[Slot] = field(init=False)
    deadline: float = field(init=False)  # monotonic
    trouble: str = ""

    def __post_init__(self) -> None:
        self.slots = [Slot(child, due=0.0) for child in sorted(self.children, key=lambda c: -c.stage)]
        self.deadline = time.monotonic() + self.seconds

    @property
    def is_complete(self) -> bool:
        return all(slot.is_ready for slot in self.slots)

    def find_trouble(self) -> str:
        """Say why it cannot be completed, "" while it may."""
        if not self.trouble and time.monotonic() >= self.deadline:
            late = ", ".join(slot.child.name for slot in self.slots if not slot.is_ready)
            self.trouble = f"not ready within {self.seconds:g} s: {late}"
        return self.trouble
