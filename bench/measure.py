"""One load on one peer, until every target has everything: the clock runs from the first message to the last copy.

Faults are counts: fewer or more messages at a target than were accepted, or an operator's list that is not empty. A
peer that does not finish within its deadline is a fault too, with what it had reached.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from bench import usage
from bench.peers import Peer
from bench.source import Load, Source

_SAMPLE = 0.05  # seconds between samples while the load runs; the sampling itself takes a core's time
_POLL = 0.005  # afterwards
_SLOWEST = 20.0  # messages per second that are waited for
_PATIENCE = 60.0
_LATE = 0.3  # seconds in which a surplus copy would still come


class Sample(NamedTuple):
    """What had arrived at each target, and what was pending, so many seconds after the first message."""

    at: float
    arrived: tuple[int, ...]
    pending: int


@dataclass(slots=True)
class Run:
    """One load's result, in seconds since its first message. ``cleared`` is when nothing was pending any more."""

    count: int
    accepted: float = 0.0
    drained: float = 0.0
    cleared: float = 0.0
    faults: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)  # milliseconds of a core per message, by kind of process

    @property
    def accepted_rate(self) -> float:
        return self.count / self.accepted if self.accepted else 0.0

    @property
    def drained_rate(self) -> float:
        return self.count / self.drained if self.drained else 0.0

    @property
    def clearing(self) -> float:
        """Seconds from the last acceptance until nothing was pending."""
        return max(0.0, self.cleared - self.accepted)


def run(peer: Peer, what: Load, deadline: float | None = None) -> Run:
    """Send a load through a peer and wait until it is drained. The deadline is in seconds."""
    result = Run(what.count)
    before = peer.arrived()
    goal = tuple(n + what.count for n in before)
    deadline = deadline or _PATIENCE + what.count / _SLOWEST
    kinds = peer.processes()
    spent = {kind: usage.cpu_seconds(pids) for kind, pids in kinds.items()}
    source = Source(peer.port, what)
    try:
        _watch(peer, source, result, before, goal, deadline)
    finally:
        source.kill()
    # Processes that came and went meanwhile are in their parents' clocks, those that are still there are looked up.
    for kind, pids in peer.processes().items():
        result.cpu[kind] = 1000 * max(0.0, usage.cpu_seconds(pids) - spent.get(kind, 0.0)) / what.count
    if source.trouble:
        result.faults.append(f"{peer.name}: {source.trouble}")
    elif not result.faults:
        time.sleep(_LATE)
        result.faults += [
            f"{peer.name}: {name} got {now - was} of {what.count}"
            for name, was, now in zip(peer.target_names, before, peer.arrived(), strict=True)
            if now - was != what.count
        ]
        result.faults += [f"{peer.name}: {fault}" for fault in peer.faults()]
    return result


def _watch(
    peer: Peer, source: Source, result: Run, before: tuple[int, ...], goal: tuple[int, ...], deadline: float
) -> None:
    while True:
        ended = source.ended  # looked at first: what is counted below is at least what was accepted by then
        arrived, pending = peer.arrived(), peer.pending()
        at = time.monotonic() - source.begun
        result.samples.append(Sample(at, tuple(n - b for n, b in zip(arrived, before, strict=True)), pending))
        there = all(n >= g for n, g in zip(arrived, goal, strict=True))
        if there and not result.drained:
            result.drained = at
        if ended is not None:
            result.accepted = ended - source.begun
            if source.trouble:
                return
            if there and not pending:
                result.drained = max(result.drained, result.accepted)
                result.cleared = at
                return
        if at > deadline:
            reached = dict(zip(peer.target_names, result.samples[-1].arrived, strict=True))
            result.faults.append(f"{peer.name}: not drained after {at:.0f} s: {reached}, {pending} pending")
            return
        time.sleep(_SAMPLE if ended is None else _POLL)
