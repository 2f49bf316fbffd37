"""A backup that greylists every recipient once: does the primary leg keep up, and does the backup leg catch up?"""

from __future__ import annotations

import smtplib
import time

from bench import client, content, peers, programs
from bench.client import Stream
from bench.course import Course
from bench.results import Curve, Goal, Row, percentile
from support.waiting import free_port

_PATIENCE = 120.0


def run(course: Course) -> Row:
    """Send new recipients at a rate; each is deferred once, and accepted after ``retry.first``."""
    row = Row("greylist", "A backup that greylists everything once")
    options = course.options
    rate, seconds = options.scaled(500, 50), options.scaled(30, 3)
    grey, first = options.scaled(8, 1), options.scaled(10, 2)
    with course.row(row, 1) as stage:
        port = free_port()
        programs.start(stage.stack, "greylist_server", str(port), str(grey), port=port)
        relay = peers.smtp_dup(
            stage.stack, stage.folder, addresses=[f"127.0.0.1:{port}"], settings={"retry.first": str(first)}
        )
        samples: list[tuple[float, int]] = []
        stream = Stream(relay.port, rate, seconds, content.wire(options.size), recipient=lambda n: f"r{n}@example.com")
        result = client.run(client.play(stream, lambda at: samples.append((at, relay.pending()))))
        begun = time.monotonic() - result.seconds
        for answer in sorted(set(result.refused)):
            stage.fault(f"{result.refused.count(answer)} times {answer}")
        ended = time.monotonic()
        while (waiting := relay.pending()) and time.monotonic() < ended + _PATIENCE:
            samples.append((time.monotonic() - begun, waiting))
            time.sleep(0.1)
        clearing = time.monotonic() - ended
        samples.append((time.monotonic() - begun, waiting))
        sent = len(result.timings)
        accepted, deferred, distinct = _counts(port)
        if (accepted, distinct, relay.targets[0].count, waiting) != (sent, sent, sent, 0):
            stage.fault(
                f"{sent} accepted, {relay.targets[0].count} at the primary, "
                f"{accepted} ({distinct} different) at the backup, {waiting} pending"
            )
        for fault in relay.faults():
            stage.fault(fault)
        times = [t.since_due for t in result.timings]
        row.add("smtp-dup", "accepted", "msg/s", [sent / result.seconds])
        row.add("smtp-dup", "p50", "ms", [1000 * percentile(times, 0.5)])
        row.add("smtp-dup", "p99", "ms", [1000 * percentile(times, 0.99)])
        row.add("smtp-dup", "most pending", "copies", [max(n for _, n in samples)])
        row.add("smtp-dup", "deferrals per copy", "", [deferred / max(1, sent)])
        row.add("smtp-dup", "until nothing is pending", "s", [clearing])
        row.goals = [
            Goal("accepted while everything is greylisted", sent / result.seconds, 0.95 * rate, unit="msg/s"),
            # The last copy is deferred for retry.first and its jitter, and a look of the scheduler.
            Goal("caught up after the last message", clearing, 2 * first + 5, at_least=False, unit="s"),
        ]
        row.curves = [Curve("copies pending", f"{rate} msg/s", *zip(*samples, strict=True))]
        row.notes.append(
            f"{rate} new recipients a second for {seconds} s, accepted {grey} s after the first try; "
            f"retry.first {first} s"
        )
        stage.step(f"{sent} messages, {deferred} deferrals, nothing pending {clearing:.1f} s after the last")
    return row


def _counts(port: int) -> tuple[int, ...]:
    with smtplib.SMTP("127.0.0.1", port, timeout=10) as connection:
        return tuple(int(word) for word in connection.docmd("COUNTS")[1].split())
