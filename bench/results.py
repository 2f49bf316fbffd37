"""What a row of the benchmark yields: figures, goals, curves, and faults, which alone make a run fail.

A figure keeps every round's value; what is shown is the median. A fault is a count that is wrong (a message lost,
sent twice, refused), never a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of one subject over the rounds: ``Figure("postfix bcc", "kept, drained", "msg/s", (...))``."""

    subject: str
    metric: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "metric": self.metric,
            "unit": self.unit,
            "median": self.median,
            "values": list(self.values),
        }


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure or a ratio should be; it is shown, and never makes a run fail."""

    text: str
    measured: float
    limit: float
    at_least: bool = True
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "measured": self.measured,
            "limit": self.limit,
            "at_least": self.at_least,
            "unit": self.unit,
            "met": self.met,
        }


class Curve(NamedTuple):
    """Points of a plot; curves with the same ``plot`` share it. A ``plot`` that starts with ``distribution`` is one."""

    plot: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(slots=True)
class Row:
    """The result of one row. ``bars`` names the metrics that are drawn as bars."""

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bars: tuple[str, ...] = ()
    seconds: float = 0.0

    def add(self, subject: str, metric: str, unit: str, values: Iterable[float]) -> None:
        """Note a figure; nothing is noted of no values."""
        if found := tuple(values):
            self.figures.append(Figure(subject, metric, unit, found))

    def median(self, subject: str, metric: str) -> float:
        """Return a figure's median, 0 where there is no such figure."""
        return next((f.median for f in self.figures if (f.subject, f.metric) == (subject, metric)), 0.0)

    def goal_ratio(self, text: str, of: tuple[str, str], to: tuple[str, str], limit: float) -> None:
        """Note the ratio of two medians as a goal, where both were measured."""
        over, under = self.median(*of), self.median(*to)
        if over and under:
            self.goals.append(Goal(text, over / under, limit, unit="x"))

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "seconds": round(self.seconds, 1),
            "figures": [f.to_json() for f in self.figures],
            "goals": [g.to_json() for g in self.goals],
            "faults": self.faults,
            "notes": self.notes,
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of them lies (nearest rank); 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
