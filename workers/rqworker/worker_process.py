"""A worker process: the courier in the thread of its event loop, the DeliveryWorker in the main thread.

Wiring only: put back the jobs of dead predecessors, start the courier, work, drain. It exits with 0 after a stop signal
and with 1 if the loop's thread ends unexpectedly, so that the supervisor starts another. If Redis is down at the start,
it waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop
from loguru import logger
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.serializers import JSONSerializer

from relay.child import ChildContext
from relay.config.model import RedisSettings
from relay.redisio.clients import sync_client
from relay.repeated import Backoff, Repeated
from workers import jobs
from workers.jobs import Deliverer
from workers.rqworker.revival import dead_here, forget, revive, worker_name
from workers.rqworker.worker import DeliveryWorker

T = TypeVar("T")
_STOP = {signal.SIGTERM, signal.SIGINT}
_LAST_WORD_SECONDS = 2.0  # for the last log line when the process must end
_NICENESS = 10  # incoming mail has priority: copies can wait for a processor, clients should not


class CourierThread:
    """The event loop of the courier in a thread. Stop signals reach it through a pipe and start the drain."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._closing = False
        self._drain: asyncio.Task[None] | None = None
        self._courier: Deliverer | None = None
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)

    def start(self, make: Callable[[], Deliverer]) -> Deliverer:
        """Start the loop and the courier in it. The main thread's signals are watched from now on."""
        self._thread.start()
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        self._courier = self.call(self._start(make))
        return self._courier

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def finish(self) -> None:
        """Drain the courier, if that has not begun, wait for it and end the loop."""
        self.call(self._drained())
        self._closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup:
            os.close(descriptor)
        self.loop.close()

    async def _start(self, make: Callable[[], Deliverer]) -> Deliverer:
        self.loop.add_reader(self._wakeup[0], self._on_signal)
        courier = make()
        await courier.start()
        return courier

    def _on_signal(self) -> None:
        numbers = os.read(self._wakeup[0], 4096)
        if any(n in _STOP for n in numbers) and self._courier:
            self._begin_drain(self._courier)

    def _begin_drain(self, courier: Deliverer) -> asyncio.Task[None]:
        if self._drain is None:
            self._drain = self.loop.create_task(courier.drain())
        return self._drain

    async def _drained(self) -> None:
        if self._courier:
            await self._begin_drain(self._courier)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            if not self._closing:  # unexpected, and the main thread may wait for the loop for ever
                # Logged in another thread: the log's lock may be held by a thread that waits for this one.
                told = threading.Thread(target=logger.critical, args=("the courier's loop has ended",), daemon=True)
                try:
                    told.start()
                    told.join(_LAST_WORD_SECONDS)
                finally:
                    os._exit(1)


def connector(server: RedisSettings, timeout: float = 10.0) -> Callable[[], Redis]:
    """Return a function that makes a client for a worker, without retries: a repeated pop would strand a job."""
    return lambda: sync_client(server, timeout, retries=0)


def serve(
    context: ChildContext,
    *,
    destination: str,
    queue_name: str,
    connect: Callable[[], Redis],
    make_courier: Callable[[str], Deliverer],
    on_dead: Callable[[Redis, str], None] | None = None,
) -> int:
    """Run a worker until a stop signal; the ``run`` of a supervisor's child. Returns the exit status.

    ``connect`` makes a synchronous client, see ``connector``. ``make_courier`` gets the worker's name and is
    called in the courier's loop. ``on_dead`` gets the name of each dead predecessor before its jobs go back
    to the queue, to give back its leases in the ledger.
    """
    os.nice(_NICENESS)
    name = worker_name(destination, context.instance)
    thread = CourierThread()
    worker: DeliveryWorker | None = None
    early: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if worker is None:
            early.append(number)
        else:
            worker.request_stop(number)

    for number in _STOP:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connection = connect()
    pauses = Backoff(0.05, 2.0)
    away = Repeated(f"worker {name}: waiting for Redis", logger.warning, logger.info)
    while not early:
        try:
            predecessor = context.predecessor and worker_name(destination, context.predecessor)
            revive_predecessors(connection, queue_name, predecessor, on_dead)
            worker = DeliveryWorker(queue_name, connection=connection, name=name)
            away.is_over()
            break
        except (RedisError, OSError) as error:
            away.came(str(error))
            context.ready()  # without Redis, waiting is all it can do
            time.sleep(pauses.next())
    if worker is None:
        return 0
    courier = thread.start(lambda: make_courier(name))
    worker.accepts = lambda: courier.accepting
    worker.room = lambda: courier.room
    if early:
        worker.stopping = True
    jobs.bind(destination, courier, thread.loop)
    logger.info("worker {} serves {}", name, queue_name)
    context.ready()
    try:
        worker.work()
    finally:
        thread.finish()
        jobs.unbind()
    return 0


def revive_predecessors(
    connection: Redis,
    queue_name: str,
    predecessor: str | None,
    on_dead: Callable[[Redis, str], None] | None = None,
) -> list[str]:
    """Put back the jobs of dead workers of this place, the predecessor's first; returns the ids of the jobs."""
    queue = Queue(queue_name, connection=connection, serializer=JSONSerializer)
    dead = [predecessor] if predecessor else []
    dead += [name for name in dead_here(connection, queue) if name != predecessor]
    again: list[str] = []
    for name in dead:
        if on_dead:  # first: another worker that takes the job must find its copies unleased
            on_dead(connection, name)
        again += (jobs_again := revive(connection, queue, name))
        if jobs_again:
            logger.warning("worker {} died; back to the queue: {}", name, ", ".join(jobs_again))
    forget(connection, queue, dead)
    return again
