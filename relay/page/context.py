"""What every request of the page has at hand: settings, Redis, threads for what blocks, who may log in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

import redis.asyncio
from redis import Redis

from relay.config.model import Settings
from relay.page.hosts import Hosts
from relay.page.users import CurrentUsers, Tries
from relay.redisio.clients import async_client, sync_client

ASK_SECONDS = 10.0  # for what a view wants to know of Redis or a file
_SESSION_SECONDS = 2.0  # for Redis to say who asks: somebody waits for a page
_THREADS = 4

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class PageContext:
    """One for each housekeeping process; ``redis`` and ``stopping`` belong to the loop of the page."""

    settings: Settings  # with the address of Redis in it
    redis: redis.asyncio.Redis
    sync_redis: Redis
    hosts: Hosts
    users: CurrentUsers
    stop: threading.Event
    tries: Tries = field(default_factory=Tries)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_THREADS, "page"))

    @classmethod
    def of(cls, settings: Settings, stop: threading.Event) -> PageContext:
        """Return the context for settings whose Redis has its address."""
        seconds = settings.redis.timeout_seconds
        return cls(
            settings,
            async_client(settings.redis, min(seconds, _SESSION_SECONDS), retries=1),
            sync_client(settings.redis, seconds, retries=1),
            Hosts.of(settings.status),
            CurrentUsers(settings.status.users_file),
            stop,
        )

    @property
    def has_users(self) -> bool:
        """Whether there is a users file: then nobody sees anything who has not logged in."""
        return self.settings.status.users_file is not None

    @property
    def is_stopping(self) -> bool:
        """Whether this process ends: a stream of events has to end with it."""
        return self.stop.is_set()

    async def ask(
        self,
        question: Callable[Concatenate[Redis, P], T],
        /,
        *args: P.args,
        **options: P.kwargs,
    ) -> T:
        """Call ``question(redis, …)`` in a thread, with a blocking client. Raises TimeoutError, and what it raises."""
        return await self.in_thread(lambda: question(self.sync_redis, *args, **options))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what blocks, such as reading a file, in a thread of the page. Raises TimeoutError, and what it raises."""
        async with asyncio.timeout(ASK_SECONDS):
            return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def close(self) -> None:
        """Give back connections and threads."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        await self.redis.aclose()
        self.sync_redis.close()
