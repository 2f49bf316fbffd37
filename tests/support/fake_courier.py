"""A courier for the worker's tests: it notes what it is given and does as it is told."""

from __future__ import annotations

import asyncio
import threading


class NotingCourier:
    """Notes (job id, ids) in ``calls``; ``hold`` makes ``deliver`` wait for ``let_go``; ``fault`` is raised."""

    def __init__(self) -> None:
        self.accepting = True
        self.room = 0
        self.calls: list[tuple[str, list[str]]] = []
        self.started = False
        self.drained = False
        self.fault: Exception | None = None
        self.faults: dict[str, Exception] = {}  # by job
        self.hold = False
        self.busy = threading.Event()
        self._go = asyncio.Event()

    async def start(self) -> None:
        self.started = True

    async def deliver(self, job_id: str, ids: list[str]) -> None:
        self.calls.append((job_id, ids))
        self.busy.set()
        if self.hold:
            await self._go.wait()
        if fault := self.faults.get(job_id, self.fault):
            raise fault

    async def drain(self) -> None:
        self.drained = True
        self._go.set()

    async def let_go(self) -> None:
        self.hold = False
        self._go.set()
