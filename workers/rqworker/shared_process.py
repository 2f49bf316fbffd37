"""One worker process for many quiet destinations: each has a DeliveryWorker and a courier only while it has jobs.

The main thread looks ten times a second whether a queue has jobs. A destination that has any gets a session: a thread
for its DeliveryWorker, a courier in the loop that all share. So none waits for another, and one without mail costs
nothing but its name in one command. A session without a job for a while ends. A destination that the supervisor gave a
process of its own, since it is busy or in trouble, is left to that as long as it lives. If Redis is away, it waits.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue

from relay.child import ChildContext
from relay.repeated import Backoff, Repeated
from relay.stopping import StopSignal
from workers.rqworker.courier_thread import STOP, CourierThread
from workers.rqworker.revival import served_by_a_sibling, worker_name
from workers.rqworker.worker import DeliveryWorker
from workers.rqworker.worker_process import NICENESS, Served, revive_predecessors, work

_LOOK_SECONDS = 0.1
_SIBLINGS_SECONDS = 1.0  # between two looks whether a destination has a process of its own
_IDLE_SECONDS = 5.0  # without a job, until a session ends: that costs what five seconds of an idle one do
_PAUSE_SECONDS = 5.0  # until a destination whose session has failed gets another


class _Session:
    """The work for one tenant while it has jobs, in a thread of its own."""

    def __init__(self, tenant: Served, loop: CourierThread, connect: Callable[[], Redis]) -> None:
        self.tenant = tenant
        self.is_open = True  # until it takes no further job; then it drains
        self.has_failed = False
        self._loop, self._connect = loop, connect
        self._worker: DeliveryWorker | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=f"worker {tenant.destination}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Have it take no further job, and drain."""
        self._is_stopping = True
        if self._worker:
            self._worker.stop()

    def join(self) -> None:
        self._thread.join()

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def idle_seconds(self) -> float:
        return self._worker.idle_seconds if self._worker else 0.0

    def _run(self) -> None:
        tenant = self.tenant
        try:
            with self._connect() as connection:
                name = worker_name(tenant.destination, f"{os.getpid()}.{time.time_ns() // 1_000_000}")
                revive_predecessors(connection, tenant)
                worker = DeliveryWorker(tenant.queue_name, connection=connection, name=name)
                courier = self._loop.add(lambda: tenant.make_courier(name))
                try:
                    self._worker = worker
                    if self._is_stopping:
                        worker.stop()
                    work(worker, courier, tenant.destination, self._loop)
                finally:
                    self.is_open = False
                    self._loop.drain(courier)
        except (RedisError, OSError) as error:
            self.has_failed = True
            logger.warning("worker {}: {}", tenant.destination, error)
        except Exception:  # the border of this thread: the other tenants go on
            self.has_failed = True
            logger.exception("worker {} failed", tenant.destination)
        finally:
            self.is_open = False


class SharedProcess:
    """Opens and ends sessions for its tenants; ``look`` is to be called again and again."""

    def __init__(self, tenants: Sequence[Served], loop: CourierThread, connect: Callable[[], Redis]) -> None:
        self._tenants = {tenant.destination: tenant for tenant in tenants}
        self._loop, self._connect = loop, connect
        self._connection = connect()
        self._sessions: dict[str, _Session] = {}
        self._draining: list[_Session] = []
        self._left_until: dict[str, float] = {}  # monotonic; to a process of its own, or after a failure
        self._next_look = 0.0  # monotonic; at siblings and idle sessions

    def revive(self) -> None:
        """Put back what dead predecessors have had in hand. Raises RedisError."""
        for tenant in self._tenants.values():
            revive_predecessors(self._connection, tenant)

    def look(self) -> None:
        """Open sessions for who has jobs, end those that are not needed. Raises RedisError."""
        self._bury()
        now = time.monotonic()
        candidates = [
            tenant
            for name, tenant in self._tenants.items()
            if name not in self._sessions and self._left_until.get(name, 0.0) <= now
        ]
        for tenant in self._with_jobs(candidates):
            if self._is_left(tenant):
                continue
            session = self._sessions[tenant.destination] = _Session(tenant, self._loop, self._connect)
            session.start()
        if now >= self._next_look:
            self._next_look = now + _SIBLINGS_SECONDS
            self._end_idle_sessions()

    def finish(self) -> None:
        """End all sessions, each when it has drained."""
        for session in self._sessions.values():
            session.stop()
        for session in (*self._sessions.values(), *self._draining):
            session.join()
        with suppress(RedisError, OSError):
            self._connection.close()

    def _with_jobs(self, tenants: Sequence[Served]) -> list[Served]:
        keys = [Queue.redis_queue_namespace_prefix + tenant.queue_name for tenant in tenants]
        if not keys or not self._connection.exists(*keys):
            return []
        with self._connection.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.exists(key)
            return [tenant for tenant, found in zip(tenants, pipeline.execute(), strict=True) if found]

    def _is_left(self, tenant: Served) -> bool:
        """Whether a process of its own serves it, as looked up once a second."""
        if not served_by_a_sibling(self._connection, tenant.queue(self._connection)):
            return False
        self._left_until[tenant.destination] = time.monotonic() + _SIBLINGS_SECONDS
        return True

    def _end_idle_sessions(self) -> None:
        idle = [s.tenant for s in self._sessions.values() if s.idle_seconds > _IDLE_SECONDS]
        busy = self._with_jobs(idle)  # a paused destination keeps its jobs, and so its session with what it knows
        for session in self._sessions.values():
            is_idle = session.tenant in idle and session.tenant not in busy
            if is_idle or self._is_left(session.tenant):
                session.stop()

    def _bury(self) -> None:
        for name, session in [pair for pair in self._sessions.items() if not pair[1].is_open]:
            del self._sessions[name]
            self._draining.append(session)
            if session.has_failed:
                self._left_until[name] = time.monotonic() + _PAUSE_SECONDS
        self._draining = [session for session in self._draining if not session.is_over]


def serve(context: ChildContext, tenants: Sequence[Served], connect: Callable[[], Redis]) -> int:
    """Serve the tenants until a stop signal; the ``run`` of a supervisor's child. Returns the exit status."""
    os.nice(NICENESS)
    stop = StopSignal(STOP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    loop = CourierThread(context.lives)
    loop.start()
    process = SharedProcess(tenants, loop, connect)
    logger.info("one worker serves {} destinations while they are quiet", len(tenants))
    context.ready()
    try:
        _keep_looking(process, stop)
    finally:
        process.finish()
        loop.finish()
    return 0


def _keep_looking(process: SharedProcess, stop: StopSignal) -> None:
    """Look until ``stop``, through times without Redis; what the dead have left comes first."""
    pauses = Backoff(_LOOK_SECONDS, 2.0)
    away = Repeated("worker: Redis", logger.warning, logger.info)
    is_revived = False
    while not stop.is_set:
        try:
            if not is_revived:
                process.revive()
                is_revived = True
            process.look()
            away.is_over()
            pauses.reset()
            pause = _LOOK_SECONDS
        except (RedisError, OSError) as error:
            away.came(str(error))
            pause = pauses.next()
        stop.wait(pause)
