"""A backlog of a million copies: what the ledger's operations cost then, against an empty one.

Costs are Redis's own time (its command statistics), so that what else runs on the machine hardly matters.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import redis

from bench import ROOT, content
from bench.course import Course, Stage
from bench.results import Goal, Row
from relay.config.loader import load
from relay.ledger import changes, continuity, keys, overview, rq_jobs
from relay.ledger.changes import Released, Staged
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from support.batches import stage as stage_by_pipeline
from support.redis_servers import RedisServer
from workers.upkeep.sweep import Sweeper

_NAME = "new"
_BODY = 512  # octets; what is in a body changes nothing here
_FILL = 1000  # messages written at once
_BATCH = 50  # messages in one group commit of the relay, and copies in one job
_BATCHES = 400
_PARTS = 100
_JOB = 100
_PHASES = ("stage", "release", "claim", "settle")


def run(course: Course) -> Row:
    """Measure empty, fill, measure again."""
    row = Row("million", "A million pending copies")
    count = course.options.scaled(course.options.million, 10_000)
    with course.row(row, 5) as stage:
        server = RedisServer(stage.folder)
        stage.stack.callback(server.stop)
        server.start()
        client = stage.stack.enter_context(server.client())
        continuity.register(client, {}, {_NAME: Destination(name=_NAME, host="localhost", port=25).to_json()})
        messages = _messages()
        _cycle(client, messages, 20)
        empty = _cycle(client, messages, _BATCHES)
        stage.step("operations on an empty ledger")
        _fill(client, messages, count, row)
        stage.step(f"{count} copies and their jobs written")
        full = _cycle(client, messages, _BATCHES)
        stage.step("operations on the full ledger")
        _compare(row, empty, full, count)
        _summary(row, client, count)
        stage.step("queue summary")
        _sweep(stage, row, client, server, count)
        stage.step("sweeps of the reconciler")
        left = client.zcard(keys.PENDING + _NAME)
        if left != count:
            stage.fault(f"{left} copies are pending, not {count}")
    return row


# --- messages, and their life --------------------------------------------------------------------------------


def _messages() -> Iterator[Staged]:
    """Make messages for ever: one body, with an id of its own each."""
    ids = IdSource()
    body = content.wire(_BODY)
    envelope = Envelope(
        "", "a@example.com", (Recipient("b@example.com"),), time.time(), len(body), destinations=(_NAME,)
    )
    while True:
        message_id = ids.next()
        record = Message(envelope._replace(id=message_id), body).packed()
        yield Staged(message_id, record, time.time() + 3600)


def _take(messages: Iterator[Staged], count: int) -> list[Staged]:
    return [next(messages) for _ in range(count)]


def _transaction(client: redis.Redis, add: Callable[[Any], None]) -> list[Any]:
    with client.pipeline(transaction=True) as pipe:
        add(pipe)
        return list(pipe.execute())


def _released(batch: Sequence[Staged]) -> list[Released]:
    return [Released(m.id, (_NAME,)) for m in batch]


def _cycle(client: redis.Redis, messages: Iterator[Staged], batches: int) -> dict[str, tuple[float, float]]:
    """Take messages through their life, phase by phase: microseconds of Redis, and of waiting, per message.

    Redis's clock runs on while another process has its core: the lower quartile of many short parts counts.
    """
    acts: dict[str, Callable[[Any, list[Staged]], None]] = {
        "stage": stage_by_pipeline,
        "release": lambda pipe, batch: changes.release(pipe, _released(batch)),
        "claim": lambda pipe, batch: changes.claim(pipe, _NAME, "job", "worker", 60, [m.id for m in batch]),
        "settle": lambda pipe, batch: changes.settle(pipe, _NAME, [m.id for m in batch]),
    }
    each = max(1, batches // _PARTS)
    costs: dict[str, list[tuple[float, float]]] = {phase: [] for phase in _PHASES}
    for _ in range(_PARTS):
        work = [_take(messages, _BATCH) for _ in range(each)]
        for phase in _PHASES:
            client.config_resetstat()
            begun = time.perf_counter()
            for batch in work:
                _transaction(client, lambda pipe, act=acts[phase], batch=batch: act(pipe, batch))
            waited = time.perf_counter() - begun
            spent = client.info("commandstats")["cmdstat_exec"]["usec"]
            costs[phase].append((spent / (each * _BATCH), 1e6 * waited / (each * _BATCH)))
    return {
        phase: (_quartile([spent for spent, _ in found]), statistics.median(waited for _, waited in found))
        for phase, found in costs.items()
    }


def _quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def _fill(client: redis.Redis, messages: Iterator[Staged], count: int, row: Row) -> None:
    before = client.info("memory")["used_memory"]
    jobs: list[list[str]] = []
    for start in range(0, count, _FILL):
        batch = _take(messages, min(_FILL, count - start))
        _transaction(client, lambda pipe, batch=batch: stage_by_pipeline(pipe, batch))
        _transaction(client, lambda pipe, batch=batch: changes.release(pipe, _released(batch)))
        ids = [m.id for m in batch]
        jobs += [ids[n : n + _JOB] for n in range(0, len(ids), _JOB)]
    copies = client.info("memory")["used_memory"]
    queue = rq_jobs.queue(client, _NAME)
    for start in range(0, len(jobs), _FILL):
        with client.pipeline(transaction=True) as pipe:
            for ids in jobs[start : start + _FILL]:
                rq_jobs.enqueue(pipe, queue, _NAME, ids)
            pipe.execute()
    after = client.info("memory")["used_memory"]
    octets = sum(map(len, next(messages).record))
    row.add("memory", f"a copy with a record of {octets} octets", "octets", [(copies - before) / count])
    row.add("memory", f"its share of a job of {_JOB}", "octets", [(after - copies) / count])
    _wait_for_rewrite(client)


def _wait_for_rewrite(client: redis.Redis) -> None:
    """A rewrite of the log forks, which costs time that is none of the operations'."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        state = client.info("persistence")
        if not state["aof_rewrite_in_progress"] and not state["aof_rewrite_scheduled"]:
            return
        time.sleep(0.2)


# --- what it costs -------------------------------------------------------------------------------------------


def _compare(row: Row, empty: dict[str, tuple[float, float]], full: dict[str, tuple[float, float]], count: int) -> None:
    for phase in _PHASES:
        row.add(f"{phase}, empty", "Redis time", "us a message", [empty[phase][0]])
        row.add(f"{phase}, {count} pending", "Redis time", "us a message", [full[phase][0]])
        row.add(f"{phase}, empty", "with the fsync", "us a message", [empty[phase][1]])
        row.add(f"{phase}, {count} pending", "with the fsync", "us a message", [full[phase][1]])
    for phase in ("release", "settle"):
        more = 100 * (full[phase][0] / empty[phase][0] - 1)
        row.goals.append(
            Goal(f"{phase} costs more Redis time than on an empty ledger", more, 20, at_least=False, unit="%")
        )


def _summary(row: Row, client: redis.Redis, count: int) -> None:
    client.config_resetstat()
    begun = time.perf_counter()
    (found,) = overview.summary(client)
    waited = 1000 * (time.perf_counter() - begun)
    spent = sum(s["usec"] for name, s in client.info("commandstats").items() if "config" not in name) / 1000
    if found.pending != count:
        row.faults.append(f"queue summary says {found.pending} pending, not {count}")
    row.add("queue summary", "Redis time", "ms", [spent])
    row.add("queue summary", "in all", "ms", [waited])
    row.goals.append(Goal(f"queue summary of {count} pending, Redis time", spent, 20, at_least=False, unit="ms"))


def _sweep(stage: Stage, row: Row, client: redis.Redis, server: RedisServer, count: int) -> None:
    client.config_set("slowlog-log-slower-than", 200)  # microseconds
    client.config_set("slowlog-max-len", 10_000)
    sweeper = Sweeper(client, load({"relay.destination_primary": "localhost:25"}, environ={}, directories=()))
    for label, thorough in (("first sweep", False), ("second sweep", False), ("thorough sweep", True)):
        client.slowlog_reset()
        with _Probe(server.url) as probe:
            report = sweeper.sweep(thorough=thorough)
        longest = max((entry["duration"] for entry in client.slowlog_get(10_000)), default=0) / 1000
        for finding, n in report.counts.items():
            stage.fault(f"{label}: {n} {finding}")
        row.add(f"reconciler, {label}", "in all", "s", [report.seconds])
        row.add(f"reconciler, {label}", "longest command", "ms", [longest])
        row.add(f"reconciler, {label}", "ping meanwhile, p99", "ms", [probe.found["p99_ms"]])
        row.add(f"reconciler, {label}", "ping meanwhile, longest", "ms", [probe.found["max_ms"]])
    row.goals += [
        Goal(
            f"a reconciler sweep over {count} pending",
            row.median("reconciler, second sweep", "in all"),
            3,
            at_least=False,
            unit="s",
        ),
        Goal(
            "the longest that a sweep holds Redis up",
            row.median("reconciler, second sweep", "longest command"),
            20,
            at_least=False,
            unit="ms",
        ),
    ]


class _Probe:
    """Pings from another process while it is open."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.found: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.redis_probe", self._url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            # Its standard input ends, and with it the pinging.
            self.found = json.loads(self._process.communicate(timeout=30)[0])
        finally:
            self._process.kill()
            self._process.wait()
