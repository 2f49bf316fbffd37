"""Worker processes below a real supervisor: stopped, killed and restarted with jobs in hand."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from rq import Queue
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from support import forked
from support.forked import ForkedProcess
from support.running_processes import is_running
from support.waiting import wait_until

PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from relay.daemon.slots import Child
from relay.daemon.supervisor import Supervisor
from relay.config.model import RedisSettings
from workers.jobs import Interrupted
from workers.rqworker.worker_process import Served, connector, serve

folder, url = Path(sys.argv[1]), sys.argv[2]

def note(*words):
    with (folder / "events").open("a") as events:
        events.write(" ".join(words) + "\\n")

class Courier:
    "Holds each job while the file hold exists; in a drain, interrupts it if the file interrupt exists."
    accepting = True
    room = 0
    def __init__(self, name):
        self.name = name
        self.draining = False
    async def start(self):
        note("start", str(os.getpid()), self.name)
    async def deliver(self, job_id, ids):
        note("begin", job_id, *ids)
        while (folder / "hold").exists() and not (self.draining and (folder / "interrupt").exists()):
            await asyncio.sleep(0.01)
        if (folder / "loop-ends").exists():
            asyncio.get_running_loop().stop()
        if self.draining and (folder / "interrupt").exists():
            raise Interrupted
        note("done", job_id)
    async def drain(self):
        note("drain", str(os.getpid()))
        self.draining = True

def run(context):
    served = Served("new", "backup-new", Courier, lambda connection, name: note("revived", name))
    return serve(context, served, connector(RedisSettings(url, 5)))

sys.exit(Supervisor([Child("worker.new", run=run)]).run())
"""


class Run:
    """A supervisor with one worker."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.client = redis.Redis.from_url(url)
        self.queue = Queue("backup-new", connection=self.client, serializer=JSONSerializer)
        self.hold = folder / "hold"
        self.process: ForkedProcess | None = None

    def start(self) -> ForkedProcess:
        (self.folder / "program.py").write_text(PROGRAM)
        with (self.folder / "log").open("ab") as log:
            self.process = forked.start(
                [str(self.folder / "program.py"), str(self.folder), self.url],
                cwd=Path.cwd(),
                env=os.environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def put(self, *ids: str) -> str:
        call = Queue.prepare_data(
            "workers.jobs.deliver",
            ("new", [name * 16 for name in ids]),
            timeout=-1,
            result_ttl=0,
            failure_ttl=3600,
            description="deliver",
        )
        return self.queue.enqueue_many([call])[0].id

    def noted(self, kind: str) -> list[list[str]]:
        path = self.folder / "events"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [words[1:] for words in lines if words[0] == kind]

    def wait(self, kind: str, count: int = 1) -> list[list[str]]:
        wait_until(lambda: len(self.noted(kind)) >= count, message=self.read_log)
        return self.noted(kind)

    def read_log(self) -> str:
        return (self.folder / "log").read_text()

    def worker(self, count: int = 1) -> tuple[int, str]:
        """Wait for the count-th worker. Returns its pid and name."""
        pid, name = self.wait("start", count)[-1]
        return int(pid), name

    @property
    def is_clean(self) -> bool:
        """Whether no job is left anywhere."""
        return not [
            k for k in self.client.keys("rq:*") if k.startswith((b"rq:job", b"rq:exec", b"rq:wip", b"rq:queue:"))
        ]

    def close(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        pids = [int(pid) for pid, _ in self.noted("start")]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # One that is not gone yet may wait in BLMOVE, and would take the first job of the next test with it; so may
        # one that is gone, until Redis has read the end of its connection.
        wait_until(lambda: not any(map(is_running, pids)) and not self.client.info("clients")["blocked_clients"])
        self.client.close()


@pytest.fixture
def run(tmp_path: Path, redis_url: str) -> Iterator[Run]:
    under_test = Run(tmp_path, redis_url)
    yield under_test
    under_test.close()


def test_stop_finishes_the_job_in_hand(run: Run) -> None:
    """SIGTERM: the job in hand is finished, no other is begun, the courier drains, the status is 0."""
    run.hold.touch()
    first, second = run.put("a"), run.put("b")
    supervisor = run.start()
    run.wait("begin")
    supervisor.terminate()
    run.wait("drain")
    run.hold.unlink()
    assert supervisor.wait(20) == 0
    assert run.noted("done") == [[first]]
    assert run.queue.job_ids == [second]
    assert StartedJobRegistry(queue=run.queue).get_job_ids(cleanup=False) == []
    assert run.client.smembers("rq:workers") == set()


def test_stop_of_an_interrupted_job_puts_it_back(run: Run) -> None:
    """SIGTERM: a job that the draining courier leaves is the first to run after the next start."""
    run.hold.touch()
    (run.folder / "interrupt").touch()
    first, second = run.put("a"), run.put("b")
    supervisor = run.start()
    run.wait("begin")
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert run.queue.job_ids == [first, second]
    run.hold.unlink()
    supervisor = run.start()
    assert run.wait("done", 2) == [[first], [second]]
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert run.is_clean


def test_job_of_a_killed_worker_runs_again_first(run: Run) -> None:
    """SIGKILL in the middle of a job: the replacement gives back its leases and runs the same job before all others."""
    run.hold.touch()
    first, second = run.put("a"), run.put("b")
    run.start()
    pid, name = run.worker()
    run.wait("begin")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert run.wait("begin", 2)[1] == [first, "a" * 16]
    assert time.monotonic() - began < 30  # of the minutes after which RQ calls a job abandoned
    run.hold.unlink()
    assert run.wait("done", 2) == [[first], [second]]
    assert run.noted("revived") == [[name]]
    assert run.worker(2)[1] != name
    wait_until(lambda: run.is_clean)


def test_jobs_of_a_killed_installation_run_again(run: Run) -> None:
    """SIGKILL of the supervisor and its worker at once: the next start runs the job that was in hand."""
    run.hold.touch()
    job = run.put("a")
    supervisor = run.start()
    pid, name = run.worker()
    run.wait("begin")
    os.kill(pid, signal.SIGSTOP)  # it must not see the parent's death before its own
    supervisor.kill()
    os.kill(pid, signal.SIGKILL)
    supervisor.wait(20)
    run.hold.unlink()
    run.start()
    assert run.wait("done") == [[job]]
    assert run.noted("revived") == [[name]]


def test_end_of_the_loop_is_the_end_of_the_worker(run: Run) -> None:
    """A courier's loop that ends by itself takes the process with it, and the job runs again in the next."""
    (run.folder / "loop-ends").touch()
    job = run.put("a")
    run.start()
    run.wait("begin")
    run.wait("start", 2)
    (run.folder / "loop-ends").unlink()
    wait_until(lambda: [job] in run.noted("done"))


def test_redis_that_comes_later_is_waited_for(run: Run, tmp_path: Path) -> None:
    """A worker that finds no Redis at its start waits for it, and still stops with 0 when told to."""
    run.url = f"unix://{tmp_path}/nowhere.sock"
    supervisor = run.start()
    wait_until(lambda: "waiting for Redis" in run.read_log())
    supervisor.terminate()
    assert supervisor.wait(20) == 0
    assert run.noted("start") == []
