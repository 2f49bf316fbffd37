"""Scheduled jobs come to their queues when due, through restarts; the housekeeping process's tasks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.registry import ScheduledJobRegistry
from rq.serializers import JSONSerializer

from relay.config.model import RedisSettings
from support.redis_servers import RedisServer
from support.waiting import wait_until
from workers.rqworker.scheduler import Scheduler, keep_scheduling
from workers.rqworker.worker_process import connector


def schedule(queue: Queue, count: int, seconds: float = -5) -> list[str]:
    """Schedule jobs in ``seconds`` from now, in one transaction."""
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    made = []
    with queue.connection.pipeline() as pipeline:
        for n in range(count):
            job = queue.create_job("workers.jobs.deliver", args=("new", [str(n)]), timeout=-1, result_ttl=0)
            made.append(queue.schedule_job(job, when, pipeline=pipeline).id)
        pipeline.execute()
    return made


@contextmanager
def scheduling(url: str, names: list[str], lock: str = "host-state") -> Iterator[threading.Event]:
    """Run a scheduler in a thread."""
    stop = threading.Event()
    connect = connector(RedisSettings(url, 5))
    thread = threading.Thread(target=keep_scheduling, args=(connect, lambda: list(names), lock, stop))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def test_due_jobs_move_and_others_wait(redis_url: str, redis_client: redis.Redis) -> None:
    """What is due comes to its queue, what is not stays; the lock is given back at the end."""
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    due, later = schedule(queue, 3), schedule(queue, 1, seconds=600)
    with scheduling(redis_url, ["backup-new"]):
        wait_until(lambda: queue.count == 3)
        assert redis_client.get("rq:scheduler-lock:backup-new") == b"host-state"
    assert sorted(queue.job_ids) == sorted(due)
    assert ScheduledJobRegistry(queue=queue).get_job_ids() == later
    assert redis_client.get("rq:scheduler-lock:backup-new") is None


def test_many_due_jobs_move_without_a_pause(redis_url: str, redis_client: redis.Redis) -> None:
    """Several thousand due at once do not take a second per thousand."""
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    schedule(queue, 2500)
    scheduler = Scheduler(connector(RedisSettings(redis_url, 5))(), "host-state")
    rounds = [scheduler.round(["backup-new"]) for _ in range(3)]
    assert rounds == [True, True, False]
    assert queue.count == 2500
    scheduler.close()


def test_queues_may_come_and_go(redis_url: str, redis_client: redis.Redis) -> None:
    """The queues are asked for each round: a new one is served, the lock of one that is gone is given back."""
    names = ["backup-old"]
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    schedule(queue, 1)
    with scheduling(redis_url, names):
        wait_until(lambda: redis_client.get("rq:scheduler-lock:backup-old"))
        names[:] = ["backup-new"]
        wait_until(lambda: queue.count == 1)
        assert redis_client.get("rq:scheduler-lock:backup-old") is None


def test_restart_takes_its_own_lock_at_once(redis_url: str, redis_client: redis.Redis) -> None:
    """A scheduler that was killed leaves its lock to the next of the same name; another name's is respected."""
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    schedule(queue, 1)
    killed = Scheduler(connector(RedisSettings(redis_url, 5))(), "host-state")
    killed.round([])
    killed._queue_names = {"backup-new"}
    killed.acquire_locks()
    other = Scheduler(connector(RedisSettings(redis_url, 5))(), "elsewhere-state")
    assert not other.round(["backup-new"])
    assert queue.count == 0
    again = Scheduler(connector(RedisSettings(redis_url, 5))(), "host-state")
    assert not again.round(["backup-new"])
    assert queue.count == 1
    for scheduler in (killed, other, again):
        scheduler.close()


def test_nothing_that_redis_holds_stops_a_queue(redis_url: str, redis_client: redis.Redis) -> None:
    """What is no job, no text, no hash or unfolds without end is taken off; a key of another type is passed over."""
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    (sound,) = schedule(queue, 1)
    key = ScheduledJobRegistry(queue=queue).key
    hostile = [b"\xff\xfe\0", b"../../x", b"\x1b[2J", b"x" * 100_000, b"no-hash", b"bomb"]
    redis_client.zadd(key, dict.fromkeys(hostile, 1.0))
    redis_client.lpush("rq:job:no-hash", "x")
    redis_client.hset("rq:job:bomb", mapping={"data": zlib.compress(bytes(500_000_000), 1), "status": "scheduled"})
    redis_client.set(ScheduledJobRegistry("backup-bad", connection=redis_client).key, "no list")
    scheduler = Scheduler(connector(RedisSettings(redis_url, 5))(), "host-state")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not scheduler.round(["backup-bad", "backup-new"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    scheduler.close()
    assert sound in queue.job_ids
    assert set(queue.job_ids) <= {sound, "bomb"}  # its worker refuses it
    assert redis_client.zcard(key) == 0


def test_unreadable_job_holds_nothing_up(redis_url: str, redis_client: redis.Redis) -> None:
    """A damaged record is taken off the schedule, and the others come to the queue."""
    queue = Queue("backup-new", connection=redis_client, serializer=JSONSerializer)
    damaged, *sound = schedule(queue, 3)
    redis_client.hset(f"rq:job:{damaged}", "created_at", "yesterday")
    with scheduling(redis_url, ["backup-new"]):
        wait_until(lambda: queue.count == 2)
    assert sorted(queue.job_ids) == sorted(sound)
    assert ScheduledJobRegistry(queue=queue).get_job_ids() == []


def test_redis_restart_is_survived(redis_factory: Callable[..., RedisServer]) -> None:
    """A Redis that goes away and comes back only delays what is due."""
    server = redis_factory()
    with scheduling(server.url, ["backup-new"]):
        with server.client() as client:
            wait_until(lambda: client.get("rq:scheduler-lock:backup-new"))
        server.kill()
        server.start()
        with server.client() as client:
            queue = Queue("backup-new", connection=client, serializer=JSONSerializer)
            schedule(queue, 1)
            wait_until(lambda: queue.count == 1)


HOUSEKEEPING = r"""
import os, sys
from workers.upkeep.housekeeping import housekeep

def say(line):
    os.write(1, line.encode())  # whole lines, whichever thread

def task(name):
    def run(stop):
        say(f"up {name}\n")
        if name == "sick":
            raise ValueError("a fault")
        stop.wait()
        say(f"down {name}\n")
    return run

sys.exit(housekeep({name: task(name) for name in sys.argv[1:]}))
"""


def housekeep(folder: Path, *names: str) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(HOUSEKEEPING)
    return subprocess.Popen(
        [sys.executable, str(folder / "program.py"), *names],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_housekeeping_stops_its_tasks(tmp_path: Path) -> None:
    """SIGTERM tells each task to stop, waits for all, and the status is 0."""
    with housekeep(tmp_path, "one", "two") as process:
        assert process.stdout
        assert sorted(process.stdout.readline().strip() for _ in range(2)) == ["up one", "up two"]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["down one", "down two"]


def test_failed_task_ends_the_process(tmp_path: Path) -> None:
    """A task that fails stops the others in order and ends the process with 1, for the supervisor to start anew."""
    with housekeep(tmp_path, "one", "sick") as process:
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "down one" in output
    assert "a fault" in errors


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before
