"""How much longer a client waits than it would at the primary itself, at half of what smtp-dup can take."""

from __future__ import annotations

import time

from bench import client, content, peers
from bench.client import Stream, Timing
from bench.course import Course, Stage
from bench.peers import Peer
from bench.results import Curve, Goal, Row, percentile
from bench.rows import throughput
from bench.source import Load

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_WITH, _WITHOUT = "through smtp-dup", "the primary itself"


def run(course: Course) -> Row:
    """Play the same stream to both in turn; what was added is the difference of their percentiles, round by round."""
    row = Row("latency", "Latency added at half load")
    options = course.options
    seconds = options.scaled(int(max(10, options.seconds)), 2)
    with course.row(row, 2 * options.rounds + 1) as stage:
        relay = peers.smtp_dup(stage.stack, stage.folder)
        target = peers.direct(stage.stack)
        load = Load(1, content.file(stage.folder, options.size), options.sessions, kept=True)
        most = throughput.one(stage, relay, load.of(options.scaled(3000, 200)), "what it can take").accepted_rate
        rate = options.scaled(round(most / 2), 50)
        row.notes.append(f"{rate} messages a second at random moments, {options.size} octets, kept connections")
        body = content.wire(options.size)
        timings: dict[str, list[list[Timing]]] = {_WITH: [], _WITHOUT: []}
        for turn in range(options.rounds):
            for name, peer in ((_WITHOUT, target), (_WITH, relay)):
                stream = Stream(peer.port, rate, seconds, body, seed=turn)
                timings[name].append(_play(stage, peer, stream, f"round {turn + 1}: {name}"))
        _tell(row, timings)
    return row


def _play(stage: Stage, peer: Peer, stream: Stream, label: str) -> list[Timing]:
    before = peer.arrived()
    result = client.run(client.play(stream))
    for answer in sorted(set(result.refused)):
        stage.fault(f"{label}: {result.refused.count(answer)} times {answer}")
    accepted = len(result.timings)
    deadline = time.monotonic() + 30
    while any(now - was < accepted for was, now in zip(before, peer.arrived(), strict=True)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    for name, was, now in zip(peer.target_names, before, peer.arrived(), strict=True):
        if now - was != accepted:
            stage.fault(f"{label}: {name} got {now - was} of {accepted}")
    stage.step(
        f"{label}: {accepted} messages, "
        + ", ".join(f"{n} {_ms(result.timings, s):.2f} ms" for n, s in _PERCENTILES.items())
    )
    return result.timings


def _ms(timings: list[Timing], share: float) -> float:
    return 1000 * percentile([t.since_due for t in timings], share)


def _tell(row: Row, timings: dict[str, list[list[Timing]]]) -> None:
    for name, rounds in timings.items():
        for label, share in _PERCENTILES.items():
            row.add(name, label, "ms", [_ms(found, share) for found in rounds])
        everything = [1000 * t.since_due for found in rounds for t in found]
        # Some thousand points show the shape; the far end is kept.
        every = max(1, len(everything) // 5000)
        row.curves.append(Curve("distribution of latencies", name, sorted(everything)[::-every], ()))
    for label, share in _PERCENTILES.items():
        pairs = zip(timings[_WITH], timings[_WITHOUT], strict=True)
        row.add("added", label, "ms", [_ms(ours, share) - _ms(theirs, share) for ours, theirs in pairs])
    for label, limit in (("p50", 1.0), ("p99", 10.0)):
        row.goals.append(
            Goal(f"latency added at half load, {label}", row.median("added", label), limit, at_least=False, unit="ms")
        )
