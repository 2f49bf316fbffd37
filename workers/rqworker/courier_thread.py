"""The event loop of a process's couriers, in a thread of its own beside those that work for RQ."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvloop
from loguru import logger

from relay import log_output
from relay.child import keep_living_in_loop
from workers.jobs import Deliverer

T = TypeVar("T")
STOP = {signal.SIGTERM, signal.SIGINT}
_LAST_WORD_SECONDS = 2.0  # for the last log line when the process must end


class CourierThread:
    """The loop and its thread. Stop signals reach it through a pipe and start the drain of every courier."""

    def __init__(self, lives: Callable[[], None]) -> None:
        """``lives`` is called as long as the loop turns."""
        self._lives = lives
        self._living: asyncio.Task[None] | None = None
        self.loop = uvloop.new_event_loop()
        self._closing = False
        self._couriers: dict[Deliverer, asyncio.Task[None] | None] = {}  # with their drain, once it has begun
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)

    def start(self) -> None:
        """Start the loop. The main thread's signals are watched from now on."""
        self._thread.start()
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        self.call(self._watch())

    def add(self, make: Callable[[], Deliverer]) -> Deliverer:
        """Make a courier in the loop and start it."""
        return self.call(self._add(make))

    def drain(self, courier: Deliverer) -> None:
        """Drain a courier, if that has not begun, wait for it and forget it."""
        self.call(self._drained(courier))

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def finish(self) -> None:
        """Drain all couriers and end the loop."""
        for courier in tuple(self._couriers):
            self.drain(courier)
        self._closing = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        log_output.gather(None)
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup:
            os.close(descriptor)
        self.loop.close()

    async def _watch(self) -> None:
        log_output.gather(self.loop.call_soon)
        self.loop.add_reader(self._wakeup[0], self._on_signal)
        self._living = self.loop.create_task(keep_living_in_loop(self._lives))

    async def _add(self, make: Callable[[], Deliverer]) -> Deliverer:
        courier = make()
        self._couriers[courier] = None
        await courier.start()
        return courier

    def _on_signal(self) -> None:
        numbers = os.read(self._wakeup[0], 4096)
        if any(n in STOP for n in numbers):
            for courier in self._couriers:
                self._begin_drain(courier)

    def _begin_drain(self, courier: Deliverer) -> asyncio.Task[None]:
        task = self._couriers[courier]
        if task is None:
            task = self._couriers[courier] = self.loop.create_task(courier.drain())
        return task

    async def _drained(self, courier: Deliverer) -> None:
        await self._begin_drain(courier)
        del self._couriers[courier]

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
