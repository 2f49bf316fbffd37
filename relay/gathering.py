"""Group commit: what comes while a write is on its way leaves together in the next one.

So one fsync, of Redis or of a disk, serves many, and who comes alone does not wait for others. A group leaves at the
end of the turn of the loop in which its first item came; whoever begins the write says when it has ended.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What is gathered; ``size`` is in octets."""

    size: int


T = TypeVar("T", bound=Sized)


class Gathering(Generic[T]):
    """Items on their way into groups; ``begin`` is called with each group, and ``landed`` is called when it is written.

    So many ``flights`` are on their way at once. A group ends after so many ``octets``, but has one item at least.
    """

    def __init__(self, begin: Callable[[list[T]], None], *, flights: int = 1, octets: int = sys.maxsize) -> None:
        self._begin = begin
        self._limit = flights
        self._octets = octets
        self._queue: list[T] = []
        self._flights = 0
        self._is_scheduled = False
        self._has_landed = asyncio.Event()  # any of them; for who drains

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits; some may be on its way."""
        return not self._queue

    def add(self, item: T) -> None:
        """Have an item leave with the next group."""
        self._queue.append(item)
        if not self._is_scheduled and self._flights < self._limit:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._take_off)

    def landed(self) -> None:
        """Note that a group's write has ended, well or not."""
        self._flights -= 1
        self._take_off()
        self._has_landed.set()

    async def drain(self) -> None:
        """Wait until everything has been written."""
        while self._queue or self._flights:
            self._take_off()
            if self._flights:
                self._has_landed.clear()
                await self._has_landed.wait()

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
            self._begin(group)
