"""Many relay processes at a moderate rate: jobs for the workers stay large, since a job costs milliseconds."""

from __future__ import annotations

import time

import redis

from bench import client, content, peers
from bench.client import Stream
from bench.course import Course
from bench.results import Goal, Row


def run(course: Course) -> Row:
    """Count the jobs that 16 relay processes write for 600 messages a second in all."""
    row = Row("jobs", "Jobs of many relay processes")
    options = course.options
    processes, rate, seconds = options.scaled(16, 4), options.scaled(600, 100), options.scaled(20, 3)
    with course.row(row, options.rounds) as stage:
        relay = peers.smtp_dup(stage.stack, stage.folder, settings={"smtp.processes": str(processes)})
        assert relay.product is not None
        connection = stage.stack.enter_context(redis.Redis.from_url(relay.product.redis_url))
        jobs, rates = [], []
        for turn in range(options.rounds):
            before, arrived = _pushed(connection), relay.arrived()
            # Connections enough that the kernel gives some to every process.
            stream = Stream(relay.port, rate, seconds, content.wire(options.size), connections=200, seed=turn)
            result = client.run(client.play(stream))
            jobs.append((_pushed(connection) - before) / result.seconds)
            rates.append(len(result.timings) / result.seconds)
            for answer in sorted(set(result.refused)):
                stage.fault(f"{result.refused.count(answer)} times {answer}")
            goal = tuple(n + len(result.timings) for n in arrived)
            deadline = time.monotonic() + 30
            while (relay.arrived() != goal or relay.pending()) and time.monotonic() < deadline:
                time.sleep(0.05)
            if relay.arrived() != goal:
                stage.fault(f"round {turn + 1}: the targets have {relay.arrived()}, not {goal}")
            stage.step(f"round {turn + 1}: {jobs[-1]:.0f} jobs/s at {rates[-1]:.0f} msg/s")
        row.add(f"{processes} relay processes", "accepted", "msg/s", rates)
        row.add(f"{processes} relay processes", "jobs", "jobs/s", jobs)
        subject = row.figures[-1].subject
        row.goals = [
            Goal(f"jobs of {processes} relay processes", row.median(subject, "jobs"), 60, at_least=False, unit="jobs/s")
        ]
    return row


def _pushed(connection: redis.Redis) -> int:
    """Return how many jobs were put into queues so far; nothing else of ours uses RPUSH."""
    return int(connection.info("commandstats").get("cmdstat_rpush", {}).get("calls", 0))
