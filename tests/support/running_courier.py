"""A courier at work as in a worker, and servers that treat some messages otherwise than the rest."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from support.ledger_contents import settings
from support.reactions import Moment, Reaction
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.delivery.courier import Courier
from workers.jobs import Interrupted


class Work:
    """What a worker does: jobs one after the other, an interrupted one first again when the courier takes jobs."""

    def __init__(self, courier: Courier) -> None:
        self.courier = courier
        self.jobs: deque[tuple[str, list[str]]] = deque()
        self.is_over = False

    def add(self, ids: list[str], job: str = "") -> None:
        for start in range(0, len(ids), 100):
            self.jobs.append((job or f"job {start} {ids[start]}", ids[start : start + 100]))

    async def run(self) -> None:
        while True:
            await until(lambda: self.is_over or (self.courier.accepting and self.jobs), 600)
            if self.is_over:
                break
            job, ids = self.jobs.popleft()
            try:
                await self.courier.deliver(job, ids)
            except Interrupted:
                self.jobs.appendleft((job, ids))


@asynccontextmanager
async def at_work(
    redis_url: str, backup: ScriptedServer, connections: int = 0, worker: str = "worker", **options: str
) -> AsyncIterator[Work]:
    """A courier for "new" with a worker's loop around it."""
    options = {
        "retry_longest": "3600",
        "relay_timeout_seconds": "5",
        "relay_greeting_timeout_seconds": "0.1",
        "relay_command_timeout_seconds": "0.1",
        **options,
    }
    courier = Courier(settings(**options), backup.destination("new", connections=connections), worker, redis_url)
    await courier.start()
    work = Work(courier)
    task = asyncio.ensure_future(work.run())
    try:
        yield work
    finally:
        work.is_over = True
        backup.replies.clear()
        backup.drop()
        await courier.drain()
        await task


def named(part: str, reaction: Reaction) -> Callable[[Moment], Reaction]:
    """Return what reacts only where the command names somebody like that."""
    return lambda moment: reaction if part in moment.line else None


def at_the_dot(part: str, reaction: Reaction) -> Callable[[Moment], Reaction]:
    return lambda moment: reaction if part in moment.connection.transactions[-1].sender else None


def arrived(backup: ScriptedServer) -> set[str]:
    return {recipient for message in backup.messages for recipient in message.recipients}
