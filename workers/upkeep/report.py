"""The report of a sweep: what it found, how often, and what it did about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

# The findings of ordinary work; any other is a repair.
_ROUTINE = frozenset({
    "failed copy expired", "failed body moved", "failed.max_bytes exceeded", "given up", "many small jobs",
    "reason for refusals", "uncertain",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Repair:
    """One finding, and the action taken."""

    finding: str
    id: str
    destination: str
    action: str


@dataclass(slots=True)
class Report:
    """The result of a sweep: the number of each finding, and the first ``kept`` findings."""

    kept: float = math.inf
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Repair] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def disagreed(self) -> bool:
        """Whether ledger and RQ differed: whether any finding is more than ordinary work."""
        return any(finding not in _ROUTINE for finding in self.counts)

    def add(self, finding: str, message_id: str, destination: str, action: str) -> None:
        self.counts[finding] += 1
        if len(self.findings) < self.kept:
            self.findings.append(Repair(finding, message_id, destination, action))

    def add_aside(self, moved: Sequence[tuple[str, str]]) -> None:
        """Add the keys that were renamed, each with the type that it was of."""
        for key, kind in moved:
            self.add("key of another type", "", "", f"{key} ({kind}) renamed")
