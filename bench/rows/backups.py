"""More backups: what the primary leg loses when every message has four copies instead of one."""

from __future__ import annotations

from bench import content, peers
from bench.course import Course
from bench.results import Goal, Row
from bench.rows import throughput
from bench.source import Load


def run(course: Course) -> Row:
    """Run the same load with one, two and four backups in turn."""
    row = Row("backups", "Several backups", bars=("accepted", "drained"))
    options = course.options
    numbers = (1, 4) if options.quick else (1, 2, 4)
    with course.row(row, (options.rounds + 1) * len(numbers)) as stage:
        names = {n: f"{n} backup{'s' if n > 1 else ''}" for n in numbers}
        field = {n: peers.smtp_dup(stage.stack, stage.folder, backups=n, name=names[n]) for n in numbers}
        load = Load(1, content.file(stage.folder, options.size), options.sessions, kept=True)
        loads = {n: throughput.sized(course, stage, peer, load) for n, peer in field.items()}
        accepted: dict[int, list[float]] = {n: [] for n in numbers}
        drained: dict[int, list[float]] = {n: [] for n in numbers}
        for turn in range(options.rounds):
            for n, peer in field.items():
                result = throughput.one(stage, peer, loads[n], f"round {turn + 1}")
                if result.drained:
                    accepted[n].append(result.accepted_rate)
                    drained[n].append(result.drained_rate)
        for n, name in names.items():
            row.add(name, "accepted", "msg/s", accepted[n])
            row.add(name, "drained", "msg/s", drained[n])
        if one := row.median(names[1], "accepted"):
            lost = 100 * (1 - row.median(names[4], "accepted") / one)
            row.goals.append(Goal("accepted msg/s lost from 1 to 4 backups", lost, 25, at_least=False, unit="%"))
    return row
