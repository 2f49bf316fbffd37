"""Messages of 10 MB, against the same load straight to the primary."""

from __future__ import annotations

from bench import content, peers
from bench.course import Course
from bench.results import Row
from bench.rows import throughput
from bench.source import Load

_SESSIONS = 5


def run(course: Course) -> Row:
    """Send attachments through `up` and to a sink in turn."""
    row = Row("large", "10 MB messages", bars=("accepted", "drained"))
    options = course.options
    size = options.scaled(10_000_000, 2_000_000)
    count = options.scaled(40, 5)
    with course.row(row, 2 * options.rounds + 2) as stage:
        field = [peers.smtp_dup(stage.stack, stage.folder), peers.direct(stage.stack)]
        load = Load(count, content.file(stage.folder, size), _SESSIONS, kept=True)
        accepted: dict[str, list[float]] = {peer.name: [] for peer in field}
        drained: dict[str, list[float]] = {peer.name: [] for peer in field}
        for turn in range(options.rounds + 1):
            for peer in field:
                label = f"round {turn}" if turn else "warm-up"
                result = throughput.one(stage, peer, load if turn else load.of(_SESSIONS), label)
                if turn and result.drained:
                    accepted[peer.name].append(result.accepted_rate * size / 1e6)
                    drained[peer.name].append(result.drained_rate * size / 1e6)
        for peer in field:
            row.add(peer.name, "accepted", "MB/s", accepted[peer.name])
            row.add(peer.name, "drained", "MB/s", drained[peer.name])
        ours, theirs = field[0].name, field[1].name
        row.goal_ratio(
            "10 MB messages, drained, against straight to the primary", (ours, "drained"), (theirs, "drained"), 0.5
        )
        row.notes.append(f"{count} messages of {size / 1e6:g} MB over {_SESSIONS} kept connections")
    return row
