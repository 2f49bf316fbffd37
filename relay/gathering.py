"""Group commit: items that arrive during a write are written together in the next one.

So one fsync, of Redis or of a disk, serves many items, and a single item does not wait for others. A group is written
at the end of the event-loop iteration in which its first item arrived; the writer calls ``landed`` when it is done.
Items that nobody waits for can have their groups ``apart``, so that these are larger and fewer.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """An item with its ``size`` in octets."""

    size: int


T = TypeVar("T", bound=Sized)


class Gathering(Generic[T]):
    """Collects items into groups. ``begin`` is called with each group; the caller calls ``landed`` when it is written.

    At most ``flights`` groups are written at the same time. A group has at most ``octets``, but at least one item; it
    begins ``apart`` seconds after the one before, unless somebody hurries.
    """

    def __init__(
        self,
        begin: Callable[[list[T]], None],
        *,
        flights: int = 1,
        octets: int = sys.maxsize,
        apart: float = 0.0,
    ) -> None:
        self._begin = begin
        self._limit = flights
        self._octets = octets
        self._apart = apart
        self._not_before = 0.0  # by the loop's clock
        self._queue: list[T] = []
        self._flights = 0
        self._is_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first item
        self._has_landed = asyncio.Event()  # set when any write ends; ``drain`` waits for it

    @property
    def is_empty(self) -> bool:
        """Whether no item waits; a write may be under way."""
        return not self._queue

    def add(self, item: T) -> None:
        """Add an item to the next group."""
        self._queue.append(item)
        if not self._is_scheduled and self._flights < self._limit:
            self._schedule()

    def hurry(self) -> None:
        """Begin the next group with this turn's end, or when the one under way has landed: somebody waits for it."""
        self._not_before = 0.0
        if self._queue and self._flights < self._limit:
            self._schedule()

    def landed(self) -> None:
        """Note that the write of a group has ended, successfully or not."""
        self._flights -= 1
        if not self._apart:
            self._take_off()
        elif self._queue:
            self._schedule()
        self._has_landed.set()

    async def drain(self) -> None:
        """Wait until everything has been written."""
        while self._queue or self._flights:
            self._take_off()
            if self._flights:
                self._has_landed.clear()
                await self._has_landed.wait()

    def _schedule(self) -> None:
        self._is_scheduled = True
        loop = self._loop = self._loop or asyncio.get_running_loop()
        if self._apart:
            loop.call_at(self._not_before, self._take_off)
        else:
            loop.call_soon(self._take_off)

    def _take_off(self) -> None:
        self._is_scheduled = False
        while self._queue and self._flights < self._limit:
            count = size = 0
            for item in self._queue:
                if count and size + item.size > self._octets:
                    break
                size += item.size
                count += 1
            group, self._queue = self._queue[:count], self._queue[count:]
            self._flights += 1
            if self._apart:
                self._not_before = asyncio.get_running_loop().time() + self._apart
            self._begin(group)
