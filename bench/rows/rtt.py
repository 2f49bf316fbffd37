"""A backup that is far away: every round trip to it takes 100 ms."""

from __future__ import annotations

from bench import content, peers, programs
from bench.course import Course
from bench.peers import Peer
from bench.results import Goal, Row
from bench.rows import throughput
from bench.source import Load
from support.waiting import free_port

_MS = 100


def run(course: Course) -> Row:
    """Send as fast as the primary takes it; the copies follow at what the distance allows."""
    row = Row("rtt", f"A backup with round trips of {_MS} ms")
    options = course.options
    with course.row(row, options.rounds + 1) as stage:
        far = peers.sink(stage.stack)
        port = free_port()
        programs.start(stage.stack, "delay_proxy", str(port), str(far.port), str(_MS), port=port)
        relay = peers.smtp_dup(stage.stack, stage.folder, addresses=[f"127.0.0.1:{port}"])
        peer = Peer(relay.name, relay.port, (relay.targets[0], far), relay.pending, relay.faults)
        load = Load(1, content.file(stage.folder, options.size), options.sessions, kept=True)
        throughput.one(stage, peer, load.of(options.scaled(200, 20)), "warm-up")
        count = options.scaled(int(300 * options.seconds), 200)
        runs = [throughput.one(stage, peer, load.of(count), f"round {turn + 1}") for turn in range(options.rounds)]
        runs = [r for r in runs if r.drained]
        row.add(peer.name, "accepted", "msg/s", [r.accepted_rate for r in runs])
        row.add(peer.name, "drained", "msg/s", [r.drained_rate for r in runs])
        row.goals = [
            Goal("drained to a backup with 100 ms round trips", row.median(peer.name, "drained"), 200, unit="msg/s")
        ]
        row.curves = [throughput.pending(r, "copies pending", f"round {n}") for n, r in enumerate(runs, 1)]
    return row
