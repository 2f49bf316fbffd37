"""The DeliveryWorker's promises about single jobs, with a real Redis; whole processes are in test_worker_process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import pytest
import redis
from rq import Queue
from rq.job import JobStatus, Retry
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from relay.config.model import RedisSettings
from support.fake_courier import NotingCourier
from support.redis_servers import RedisServer
from support.waiting import PATIENCE, wait_until
from workers import jobs
from workers.rqworker.courier_thread import CourierThread
from workers.rqworker.delivery_job import DeliveryJob
from workers.rqworker.revival import dead_here, place, revive, worker_name
from workers.rqworker.worker import DeliveryWorker
from workers.rqworker.worker_process import Served, connector, revive_predecessors

QUEUE = "backup-new"
A, B = "a" * 16, "b" * 16  # message ids


class Bench:
    """A worker in this process, with a courier in its loop and a producer beside it."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url)
        self.queue = Queue(QUEUE, connection=self.client, serializer=JSONSerializer)
        self.thread = CourierThread(lambda: None)
        self.thread.start()
        self.courier: NotingCourier = self.thread.add(NotingCourier)
        jobs.bind("new", self.courier, self.thread.loop)
        self.worker = self.new_worker(url, "host.new.1.1")

    @staticmethod
    def new_worker(url: str, name: str) -> DeliveryWorker:
        return DeliveryWorker(QUEUE, connection=connector(RedisSettings(url, 5))(), name=name)

    def put(self, function: str = "workers.jobs.deliver", *args: object, **options: object) -> str:
        options = {"timeout": -1, "result_ttl": 0, "failure_ttl": 3600, "description": "deliver"} | options
        data = Queue.prepare_data(function, args or ("new", [A, B]), **options)
        return self.queue.enqueue_many([data])[0].id

    def close(self) -> None:
        self.thread.finish()
        jobs.unbind("new")
        self.worker.connection.close()
        self.client.close()

    @property
    def failed(self) -> dict[str, str]:
        """Id and reason of what the failed registry lists."""
        registry = FailedJobRegistry(queue=self.queue)
        found = {}
        for job_id in registry.get_job_ids():
            job = self.queue.fetch_job(job_id)
            assert job is not None
            result = job.latest_result()
            found[job_id] = result.exc_string if result else ""
        return found

    @property
    def job_keys(self) -> set[bytes]:
        """All that is left of jobs in Redis."""
        left = {b"rq:queues", b"rq:workers", b"rq:workers:backup-new", b"rq:worker:host.new.1.1"}
        return set(self.client.keys("rq:*")) - left


@pytest.fixture
def bench(redis_url: str) -> Iterator[Bench]:
    made = Bench(redis_url)
    yield made
    made.close()


def test_job_reaches_the_courier_and_leaves_nothing(bench: Bench) -> None:
    """A job hands its id and message ids to the courier, in order, and no key of it remains."""
    ids = [bench.put("workers.jobs.deliver", "new", [str(n) * 16]) for n in range(3)]
    assert bench.worker.work(burst=True)
    assert bench.courier.calls == [(ids[n], [str(n) * 16]) for n in range(3)]
    assert bench.job_keys == set()
    assert bench.client.hget("rq:worker:host.new.1.1", "successful_job_count") == b"3"


def test_jobs_that_wait_are_taken_together(bench: Bench) -> None:
    """As far as the courier has room, jobs begin and end together; each has its own end."""
    ids = [bench.put("workers.jobs.deliver", "new", [f"{n:015}a", f"{n:015}b"]) for n in range(6)]
    bench.client.hset(f"rq:job:{ids[2]}", "created_at", "yesterday")
    bench.worker.room = lambda: 8
    bench.courier.hold = True
    working = threading.Thread(target=bench.worker.work, kwargs={"burst": True})
    working.start()
    wait_until(lambda: len(bench.courier.calls) == 3)
    assert bench.queue.job_ids == ids[4:]
    bench.thread.call(bench.courier.let_go())
    working.join(20)
    assert [job for job, _ in bench.courier.calls] == [ids[n] for n in (0, 1, 3, 4, 5)]
    assert bench.job_keys == {f"rq:job:{ids[2]}".encode()}
    assert bench.client.hget("rq:worker:host.new.1.1", "successful_job_count") == b"5"


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("os.system", ("touch {}",)),
        ("workers.jobs.bind", ("new", None, None)),
        ("workers.jobs.asyncio.run", (1,)),
        ("workers.jobs._bound.clear", ()),
        ("workers.rqworker.worker_process.os.system", ("touch {}",)),
        ("workers.jobs.deliver", ("new",)),
        ("workers.jobs.deliver", ("new", [A], "more")),
        ("workers.jobs.deliver", ("other", [A])),
        ("workers.jobs.deliver", ("new", "abc")),
        ("workers.jobs.deliver", ("new", [1])),
        ("workers.jobs.deliver", ("new", [A, "../" + "a" * 13])),
        ("workers.jobs.deliver", ("new", [f"{A},{B}"])),
        ("workers.jobs.deliver", ("new", [])),
    ],
)
def test_forged_job_is_refused(bench: Bench, tmp_path: object, function: str, args: tuple[object, ...]) -> None:
    """A job can call deliver, with sound arguments, and nothing else; others fail with a clear reason, at once."""
    trace = f"{tmp_path}/called"
    forged = bench.put(function, *(a.format(trace) if isinstance(a, str) else a for a in args), retry=Retry(3))
    sound = bench.put()
    bench.worker.work(burst=True)
    assert [job for job, _ in bench.courier.calls] == [sound]
    assert not os.path.exists(trace)  # noqa: PTH110 - a text
    assert list(bench.failed) == [forged]
    assert bench.failed[forged].startswith("refused: ")


def test_callbacks_of_a_forged_job_are_not_called(bench: Bench) -> None:
    """Neither a success nor a failure runs what a forged record names as its callback."""
    for fault in (None, ValueError("no")):
        bench.courier.fault = fault
        job = bench.put()
        names = ("success_callback_name", "failure_callback_name", "stopped_callback_name")
        bench.client.hset(f"rq:job:{job}", mapping=dict.fromkeys(names, "os.abort"))
        bench.worker.work(burst=True)
    assert len(bench.courier.calls) == 2


def test_unreadable_and_deleted_jobs_are_passed_over(bench: Bench) -> None:
    """A damaged record and one that was deleted while it waited do not hold up the next, and strand nowhere."""
    damaged, deleted, pickled, listed, sound = (bench.put() for _ in range(5))
    bench.client.hset(f"rq:job:{damaged}", "created_at", "yesterday")
    bench.client.delete(f"rq:job:{deleted}")
    bench.client.hset(f"rq:job:{pickled}", "data", b"\x80\x04N.")
    bench.client.delete(f"rq:job:{listed}")
    bench.client.lpush(f"rq:job:{listed}", "no hash")
    bench.worker.work(burst=True)
    assert [job for job, _ in bench.courier.calls] == [sound]
    assert bench.client.llen(bench.queue.intermediate_queue_key) == 0
    assert bench.failed == {pickled: "refused: unreadable call"}


def test_a_reason_that_unfolds_without_end_is_not_read(bench: Bench) -> None:
    """Nothing in the record of a job takes more memory than it has octets."""
    bomb = bench.put()
    bench.client.hset(f"rq:job:{bomb}", "exc_info", zlib.compress(bytes(300_000_000), 1))
    record = bench.client.hgetall(f"rq:job:{bomb}")
    tracemalloc.start()
    try:
        assert DeliveryJob.of(bomb, record, bench.client) is not None
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    bench.worker.work(burst=True)
    assert [job for job, _ in bench.courier.calls] == [bomb]


def test_fault_of_ours_is_retried_then_failed(bench: Bench) -> None:
    """An exception of the courier runs the job again as often as it allows, then lists it with the reason."""
    bench.courier.fault = RuntimeError("a fault")
    job = bench.put(retry=Retry(max=3))
    bench.worker.work(burst=True)
    assert len(bench.courier.calls) == 4
    assert bench.failed == {job: "RuntimeError: a fault"}
    assert StartedJobRegistry(queue=bench.queue).get_job_ids(cleanup=False) == []


def test_interrupted_job_goes_back_to_the_front(bench: Bench) -> None:
    """A job that a draining courier could not finish is the next to run, as the same job."""
    first, second = bench.put(), bench.put()
    bench.courier.fault = jobs.Interrupted()
    bench.worker.work(max_jobs=1)
    assert bench.queue.job_ids == [first, second]
    assert bench.failed == {}
    bench.courier.fault = None
    bench.worker.work(burst=True)
    assert [job for job, _ in bench.courier.calls] == [first, first, second]
    assert bench.job_keys == set()


def test_only_the_interrupted_of_several_go_back(bench: Bench) -> None:
    """Of jobs that ran together, done ones are gone, refused ones failed, interrupted ones the next to run."""
    done, refused, first, second = (bench.put("workers.jobs.deliver", name, [A]) for name in ("new", "x", "new", "new"))
    bench.courier.faults = {first: jobs.Interrupted(), second: jobs.Interrupted()}
    bench.worker.room = lambda: 100
    bench.worker.work(max_jobs=4)
    assert sorted(bench.queue.job_ids) == sorted([first, second])
    assert list(bench.failed) == [refused]
    assert not bench.client.exists(f"rq:job:{done}")
    assert StartedJobRegistry(queue=bench.queue).get_job_ids(cleanup=False) == []


def test_kept_result_takes_rq_own_way(bench: Bench) -> None:
    """A job that asks for its result to be kept ends as RQ ends it, and is listed as finished."""
    job = bench.put(result_ttl=600)
    bench.worker.work(burst=True)
    fetched = bench.queue.fetch_job(job)
    assert fetched is not None
    assert fetched.get_status() == JobStatus.FINISHED
    assert StartedJobRegistry(queue=bench.queue).get_job_ids(cleanup=False) == []


def test_nothing_is_taken_while_the_courier_does_not_accept(bench: Bench) -> None:
    """While the breaker is open the jobs stay in the queue; when it closes they run."""
    bench.put()
    looks = iter([False, False, True])

    def accepts() -> bool:
        assert bench.queue.count == 1
        return next(looks)

    bench.worker.accepts = accepts
    bench.worker.work(max_jobs=1)
    assert len(bench.courier.calls) == 1
    assert next(looks, None) is None


def test_job_popped_as_the_stop_comes_is_put_back(bench: Bench) -> None:
    """A pop that was waiting while the stop came gives its job back, at the front."""
    first, second = bench.put(), bench.put()
    bench.worker.register_birth()
    bench.worker.request_stop()
    assert bench.worker.take(wait=True) is None
    assert bench.queue.job_ids == [first, second]
    assert bench.client.llen(bench.queue.intermediate_queue_key) == 0


def test_long_job_is_kept_alive(bench: Bench) -> None:
    """Beats renew the worker and the execution of a job that takes its time, even after their keys were lost."""
    bench.courier.hold = True
    job = bench.put()
    working = threading.Thread(target=bench.worker.work, kwargs={"max_jobs": 1})
    working.start()
    assert bench.courier.busy.wait(20)
    ((entry, _),) = bench.client.zscan("rq:wip:" + QUEUE)[1]
    bench.client.zadd("rq:wip:" + QUEUE, {entry: 1})
    bench.client.delete("rq:worker:host.new.1.1", "rq:worker:host.new.1.1:executions", "rq:workers")
    bench.worker.beat()
    assert bench.client.zscore("rq:wip:" + QUEUE, entry) > time.time() + 300
    assert bench.client.hget("rq:worker:host.new.1.1", "hostname")
    assert bench.client.smembers("rq:workers") == {b"rq:worker:host.new.1.1"}
    assert bench.client.smembers("rq:worker:host.new.1.1:executions") == {entry}
    bench.thread.call(bench.courier.let_go())
    working.join(20)
    assert entry.decode().startswith(job)
    assert bench.job_keys == set()


def test_beat_brings_nothing_back(bench: Bench) -> None:
    """A beat after the end of a job leaves no trace of its execution."""
    bench.put()
    bench.worker.work(burst=True)
    bench.worker.beat()
    assert bench.job_keys == set()


def test_maintenance_leaves_abandoned_jobs_alone(bench: Bench) -> None:
    """The worker's housekeeping calls no started or stranded job failed, however old: those are the reconciler's."""
    started, stranded = bench.put(), bench.put()
    bench.worker.register_birth()
    job = bench.worker.take(wait=False)
    assert job is not None
    bench.worker._begin(job)
    bench.client.zadd("rq:wip:" + QUEUE, {bench.client.zrange("rq:wip:" + QUEUE, 0, 0)[0]: 1})
    bench.client.lmove(bench.queue.key, bench.queue.intermediate_queue_key)
    bench.worker.run_maintenance_tasks()
    assert bench.failed == {}
    assert [j.decode().split(":")[0] for j in bench.client.zrange("rq:wip:" + QUEUE, 0, -1)] == [started]
    assert bench.client.lrange(bench.queue.intermediate_queue_key, 0, -1) == [stranded.encode()]


def test_revival_puts_back_what_one_worker_had(bench: Bench, redis_url: str) -> None:
    """Started and stranded jobs of the dead go to the front, at once and once; those of the living stay."""
    mine, others, popped, waiting = (bench.put() for _ in range(4))
    worker, other = bench.worker, bench.new_worker(redis_url, "elsewhere.new.1.1")
    for who in (worker, other):
        who.register_birth()
        job = who.take(wait=False)
        assert job is not None
        who._begin(job)
    bench.client.lmove(bench.queue.key, bench.queue.intermediate_queue_key)
    assert revive(bench.client, bench.queue, worker.name) == [mine, popped]
    assert revive(bench.client, bench.queue, worker.name) == []
    assert bench.queue.job_ids == [popped, mine, waiting]
    started = StartedJobRegistry(queue=bench.queue).get_job_ids(cleanup=False)
    assert started == [others]
    fetched = bench.queue.fetch_job(mine)
    assert fetched is not None
    assert fetched.get_status() == JobStatus.QUEUED
    assert bench.client.keys(f"rq:execution:{mine}:*") == []
    other.connection.close()


def test_only_the_dead_of_this_place_are_revived(bench: Bench, redis_url: str) -> None:
    """At its start a worker revives those that ran here and are gone, never another host's nor one that lives."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = {"gone": gone.pid, "alive": os.getpid(), "elsewhere": gone.pid, "reborn": os.getpid()}
    put = {}
    for name, pid in names.items():
        put[name] = bench.put()
        worker = bench.new_worker(redis_url, name)
        worker.register_birth()
        job = worker.take(wait=False)
        assert job is not None
        worker._begin(job)
        where = "another boot" if name == "elsewhere" else place()
        bench.client.hset(worker.key, mapping={"pid": pid, "place": where})
        if name == "reborn":  # its pid is another process's by now, as after the restart of a container
            bench.client.hset(worker.key, "born", "1")
        worker.connection.close()
    revived: list[str] = []
    assert sorted(dead_here(bench.client, bench.queue)) == ["gone", "reborn"]
    served = Served("new", QUEUE, make_courier=NotImplemented, on_dead=lambda _, name: revived.append(name))
    again = revive_predecessors(bench.client, served)
    assert sorted(again) == sorted([put["gone"], put["reborn"]])
    assert sorted(revived) == ["gone", "reborn"]
    assert revive_predecessors(bench.client, served) == []
    assert not bench.client.exists("rq:worker:gone")


def test_worker_names_are_safe() -> None:
    """A worker's name tells host, destination, pid and start, and is fit for CLIENT SETNAME."""
    assert worker_name("new.example.com:25", "12.345", "mx1") == "mx1.new.example.com:25.12.345"
    assert worker_name("odd name", "1.2", "mx1") == "mx1.odd_name.1.2"


def test_redis_restart_between_jobs_is_survived(redis_factory: Callable[..., RedisServer]) -> None:
    """A worker that waits for jobs outlives a Redis that stops and comes back, in the same process."""
    server = redis_factory()
    bench = Bench(server.url)
    working = threading.Thread(target=bench.worker.work, kwargs={"max_jobs": 2})
    working.start()
    first = bench.put()
    wait_until(lambda: len(bench.courier.calls) == 1)
    wait_until(lambda: not bench.job_keys)  # its end is written: the worker waits for the next
    server.kill()
    wait_until(lambda: bench.worker._in_doubt)
    server.start()
    second = bench.put()
    working.join(20)
    assert [job for job, _ in bench.courier.calls] == [first, second]
    bench.close()


def test_redis_restart_during_a_job_repeats_nothing(redis_factory: Callable[..., RedisServer]) -> None:
    """The end of a job that ran while Redis was away is written when it is back; the job does not run twice."""
    server = redis_factory()
    bench = Bench(server.url)
    bench.courier.hold = True
    first, second = bench.put(), bench.put()
    working = threading.Thread(target=bench.worker.work, kwargs={"max_jobs": 2})
    working.start()
    assert bench.courier.busy.wait(20)
    server.kill()
    bench.thread.call(bench.courier.let_go())
    server.start()
    working.join(20)
    assert [job for job, _ in bench.courier.calls] == [first, second]
    assert bench.job_keys == set()
    bench.close()


def test_stop_does_not_wait_for_the_next_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle worker ends at once; a job that comes then is the next worker's, and nothing says otherwise."""
    monkeypatch.setattr("workers.rqworker.worker._POLL_SECONDS", 1000)
    monkeypatch.setattr(DeliveryWorker, "connection_timeout", 2000)
    working = threading.Thread(target=bench.worker.work, daemon=True)
    working.start()
    wait_until(lambda: bench.client.info("clients")["blocked_clients"] == 1)
    bench.worker.request_stop()
    working.join(PATIENCE)
    assert not working.is_alive()
    job = bench.put()
    assert (bench.queue.job_ids, bench.client.llen(bench.queue.intermediate_queue_key)) == ([job], 0)
    assert bench.courier.calls == []


@pytest.mark.parametrize("is_cut", [False, True])
def test_a_job_popped_at_the_moment_of_a_stop_goes_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, is_cut: bool
) -> None:
    """Whether its reply has come or the connection is cut, it is in the queue again."""
    job = bench.put()
    pop = bench.worker._pop.execute

    def stop_behind(*words: object) -> object:
        popped = pop(*words)
        bench.worker.request_stop()
        return None if is_cut else popped

    monkeypatch.setattr(bench.worker._pop, "execute", stop_behind)
    assert bench.worker.take(wait=True) is None
    assert (bench.queue.job_ids, bench.client.llen(bench.queue.intermediate_queue_key)) == ([job], 0)


def test_stop_does_not_wait_for_a_redis_that_is_gone(
    redis_factory: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker told to stop while Redis is away gives up on it after some seconds; its job can be put back later."""
    monkeypatch.setattr("workers.rqworker.worker._GIVE_UP_SECONDS", 0.3)
    server = redis_factory()
    bench = Bench(server.url)
    bench.courier.hold = True
    job = bench.put()
    working = threading.Thread(target=bench.worker.work)
    working.start()
    assert bench.courier.busy.wait(20)
    server.kill()
    bench.worker.request_stop()
    bench.thread.call(bench.courier.let_go())
    working.join(20)
    assert not working.is_alive()
    server.start()
    assert revive(bench.client, bench.queue, bench.worker.name) == [job]
    bench.close()
