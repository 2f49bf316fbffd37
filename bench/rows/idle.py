"""What `up` takes when nothing is to do: processor time of the whole stack, and memory."""

from __future__ import annotations

import time

from bench import peers, usage
from bench.course import Course
from bench.results import Goal, Row

_SETTLE = 8.0  # seconds: past the start, and past the reconciler's first sweep


def run(course: Course) -> Row:
    """Leave a fresh `up` alone and read its processes' clocks."""
    row = Row("idle", "Idle")
    options = course.options
    seconds = options.scaled(20, 3)
    with course.row(row, options.rounds) as stage:
        peer = peers.smtp_dup(stage.stack, stage.folder)
        product = peer.product
        assert product is not None
        product.send("a@example.com", "b@example.com", data=b"Subject: warm\r\n\r\nup\r\n")  # everything is imported
        time.sleep(options.scaled(int(_SETTLE), 1))
        cpu: dict[str, list[float]] = {}
        kinds = usage.kinds(product)
        for turn in range(options.rounds):
            before = {kind: usage.cpu_seconds(found) for kind, found in kinds.items()}
            begun = time.monotonic()
            time.sleep(seconds)
            passed = time.monotonic() - begun
            for kind, found in kinds.items():
                cpu.setdefault(kind, []).append(100 * (usage.cpu_seconds(found) - before[kind]) / passed)
            stage.step(f"round {turn + 1}: {sum(shares[-1] for shares in cpu.values()):.2f} % of a core")
        for kind, found in kinds.items():
            row.add(f"{kind} ({len(found)} processes)", "processor", "% of a core", cpu[kind])
            row.add(f"{kind} ({len(found)} processes)", "proportional", "MB", [usage.proportional(found) / 1e6])
            row.add(f"{kind} ({len(found)} processes)", "resident", "MB", [usage.resident(found) / 1e6])
        everything = usage.pids(product)
        row.add("all", "processor", "% of a core", [sum(shares) for shares in zip(*cpu.values(), strict=True)])
        row.add("all", "proportional", "MB", [usage.proportional(everything) / 1e6])
        row.add("all", "resident", "MB", [usage.resident(everything) / 1e6])
        row.goals = [
            Goal("idle: processor", row.median("all", "processor"), 1, at_least=False, unit="% of a core"),
            Goal("idle: memory (shared pages once)", row.median("all", "proportional"), 250, at_least=False, unit="MB"),
            Goal("idle: sum of resident sets", row.median("all", "resident"), 250, at_least=False, unit="MB"),
        ]
    return row
