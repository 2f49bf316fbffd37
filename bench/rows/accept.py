"""The first benchmark that smtp-dup had to pass: 20 kept connections, 4 KB, and the backup right behind."""

from __future__ import annotations

from bench import content, peers
from bench.course import Course
from bench.results import Goal, Row
from bench.rows import throughput
from bench.source import Load


def run(course: Course) -> Row:
    """Send to `up` alone; accepted messages a second, and the seconds until nothing is pending."""
    row = Row("accept", "Acceptance with kept connections")
    options = course.options
    with course.row(row, options.rounds + 1) as stage:
        peer = peers.smtp_dup(stage.stack, stage.folder)
        load = Load(1, content.file(stage.folder, options.size), options.sessions, kept=True)
        load = throughput.sized(course, stage, peer, load)
        runs = [throughput.one(stage, peer, load, f"round {turn + 1}") for turn in range(options.rounds)]
        runs = [r for r in runs if r.drained]
        row.add(peer.name, "accepted", "msg/s", [r.accepted_rate for r in runs])
        row.add(peer.name, "drained", "msg/s", [r.drained_rate for r in runs])
        row.add(peer.name, "until nothing is pending", "s", [r.clearing for r in runs])
        for kind in runs[0].cpu if runs else ():
            row.add(peer.name, f"processor time, {kind}", "ms a message", [r.cpu[kind] for r in runs])
        row.goals = [
            Goal("accepted, kept connections", row.median(peer.name, "accepted"), 1500, unit="msg/s"),
            Goal(
                "pending is zero after the last message",
                row.median(peer.name, "until nothing is pending"),
                2,
                at_least=False,
                unit="s",
            ),
        ]
        row.curves = [throughput.pending(r, "copies pending", f"round {n}") for n, r in enumerate(runs, 1)]
    return row
