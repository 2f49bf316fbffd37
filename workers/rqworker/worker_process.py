"""A worker process: the courier in the thread of its event loop, the DeliveryWorker in the main thread.

Wiring only: put back the jobs of dead predecessors, start the courier, work, drain. It exits with 0 after a stop signal
and with 1 if the loop's thread ends unexpectedly, so that the supervisor starts another. If Redis is down at the start,
it waits.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

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
from workers.rqworker.courier_thread import STOP, CourierThread
from workers.rqworker.revival import dead_here, forget, revive, worker_name
from workers.rqworker.worker import DeliveryWorker

_REDIS_SECONDS = 10.0
NICENESS = 10  # incoming mail has priority: copies can wait for a processor, clients should not


def connector(server: RedisSettings) -> Callable[[], Redis]:
    """Return a function that makes a client for a worker, without retries: a repeated pop would strand a job."""
    return lambda: sync_client(server, _REDIS_SECONDS, retries=0)


@dataclass(frozen=True, slots=True)
class Served:
    """A destination that a worker process serves.

    ``make_courier`` gets the worker's name and is called in the courier's loop. ``on_dead`` gets the name of each dead
    predecessor before its jobs go back to the queue, to give back its leases in the ledger.
    """

    destination: str
    queue_name: str
    make_courier: Callable[[str], Deliverer]
    on_dead: Callable[[Redis, str], None] | None = None

    def queue(self, connection: Redis) -> Queue:
        return Queue(self.queue_name, connection=connection, serializer=JSONSerializer)


def serve(context: ChildContext, served: Served, connect: Callable[[], Redis]) -> int:
    """Run a worker until a stop signal; the ``run`` of a supervisor's child. Returns the exit status.

    ``connect`` makes a synchronous client, see ``connector``.
    """
    os.nice(NICENESS)
    destination, queue_name = served.destination, served.queue_name
    name = worker_name(destination, context.instance)
    thread = CourierThread(context.lives)
    worker: DeliveryWorker | None = None
    early: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if worker is None:
            early.append(number)
        else:
            worker.request_stop(number)

    for number in STOP:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connection = connect()
    pauses = Backoff(0.05, 2.0)
    away = Repeated(f"worker {name}: waiting for Redis", logger.warning, logger.info)
    while not early:
        try:
            predecessor = context.predecessor and worker_name(destination, context.predecessor)
            revive_predecessors(connection, served, predecessor)
            worker = DeliveryWorker(queue_name, connection=connection, name=name)
            away.is_over()
            break
        except (RedisError, OSError) as error:
            away.came(str(error))
            context.ready()  # without Redis, waiting is all it can do
            time.sleep(pauses.next())
    if worker is None:
        return 0
    thread.start()
    courier = thread.add(lambda: served.make_courier(name))
    if early:
        worker.stop()
    logger.info("worker {} serves {}", name, queue_name)
    context.ready()
    try:
        work(worker, courier, destination, thread)
    finally:
        thread.finish()
    return 0


def work(worker: DeliveryWorker, courier: Deliverer, destination: str, thread: CourierThread) -> None:
    """Have a worker take jobs as its courier has room for them, until it is stopped."""
    worker.accepts = lambda: courier.accepting
    worker.room = lambda: courier.room
    jobs.bind(destination, courier, thread.loop)
    try:
        worker.work()
    finally:
        jobs.unbind(destination)


def revive_predecessors(connection: Redis, served: Served, predecessor: str | None = None) -> list[str]:
    """Put back the jobs of dead workers of this place, the predecessor's first; returns the ids of the jobs."""
    queue = served.queue(connection)
    dead = [predecessor] if predecessor else []
    dead += [name for name in dead_here(connection, queue) if name != predecessor]
    again: list[str] = []
    for name in dead:
        if served.on_dead:  # first: another worker that takes the job must find its copies unleased
            served.on_dead(connection, name)
        again += (jobs_again := revive(connection, queue, name))
        if jobs_again:
            logger.warning("worker {} died; back to the queue: {}", name, ", ".join(jobs_again))
    forget(connection, queue, dead)
    return again
