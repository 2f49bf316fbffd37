"""Processor time and Redis commands that one message costs the relay, the worker and Redis."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from bench import content, peers
from bench.course import Course, Stage
from bench.peers import Peer
from bench.results import Goal, Row
from bench.rows import throughput
from bench.source import Load

WHOLE = "all three"
_GOALS = {"new connections": 0.40, "kept connections": 0.25}  # ms a message
_ASKED = ("info", "zcard", "ping")  # what this benchmark asks while it measures


def run(course: Course) -> Row:
    """Measure this tree; processor time depends less than a rate on what else the machine does."""
    row = Row("cpu", "Processor time a message")
    with course.row(row, (course.options.rounds + 1) * len(_GOALS)) as stage:
        peer = peers.smtp_dup(stage.stack, stage.folder)
        measure(course, stage, row, [peer])
        for mode, limit in _GOALS.items():
            spent = row.median(f"{peer.name}, {mode}", WHOLE)
            text = f"relay, worker and Redis, {mode}"
            row.goals.append(Goal(text, spent, limit, at_least=False, unit="ms a message"))
    return row


def measure(course: Course, stage: Stage, row: Row, products: Sequence[Peer]) -> None:
    """Give each product the same load in turn, round after round, and note what a message costs it."""
    options = course.options
    message = content.file(stage.folder, options.size)
    row.bars = (WHOLE,)
    for mode, kept in throughput.MODES.items():
        load = Load(1, message, options.sessions, kept)
        # One size for all: what a product does once a second must weigh the same.
        sizes = [throughput.sized(course, stage, peer, load).count for peer in products]
        load = load.of(max(sizes))
        found: dict[tuple[str, str, str], list[float]] = {}
        for turn in range(options.rounds):
            for peer in (products, products[::-1])[turn % 2]:
                before = _commands(peer)
                result = throughput.one(stage, peer, load, f"{mode}, round {turn + 1}")
                if not result.drained:
                    continue
                asked = (_commands(peer) - before) / load.count
                costs = [(kind, "ms a message", spent) for kind, spent in result.cpu.items()]
                whole = sum(spent for kind, spent in result.cpu.items() if kind != "other")
                costs += [(WHOLE, "ms a message", whole), ("Redis commands", "a message", asked)]
                for what, unit, value in (*costs, ("drained", "msg/s", result.drained_rate)):
                    found.setdefault((f"{peer.name}, {mode}", what, unit), []).append(value)
        for (subject, metric, unit), values in found.items():
            row.add(subject, metric, unit, values)


def _commands(peer: Peer) -> int:
    """Return the number of commands that a product's Redis has done, those within scripts included."""
    assert peer.product is not None
    with redis.Redis.from_url(peer.product.redis_url) as client:
        stats = client.info("commandstats")
    return sum(each["calls"] for name, each in stats.items() if name.removeprefix("cmdstat_") not in _ASKED)
