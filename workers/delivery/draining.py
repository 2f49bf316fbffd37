"""The waits of a courier's end, each with a time after which it is not waited for, and a line that names it.

A process that waits for one of them for ever would be alive, and at work on nothing, until somebody kills it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from loguru import logger

from relay import maillog

PATIENCE = 10.0  # seconds for what has not come to its dot, and until a drain that still waits is told
# That a drain waits for copies of which none is with the server: longer than all that Redis may take.
IDLE_SECONDS = 60.0
CLOSE_SECONDS = 5.0  # for each thing that is closed


class DrainWatch:
    """Says of a drain that goes on, asked again and again, when to cut what hangs and when to wait no more."""

    def __init__(self, destination: str) -> None:
        self._destination = destination
        self._clock = asyncio.get_running_loop().time
        self._begun_at = self._busy_at = self._clock()
        self._is_told = False

    def cuts(self, *, copies: int, jobs: int, with_server: int) -> bool:
        """Whether its patience is over; then one line has what it waits for."""
        now = self._clock()
        if with_server:
            self._busy_at = now
        if now - self._begun_at < PATIENCE:
            return False
        if not self._is_told:
            self._is_told = True
            maillog.notice(
                "warning",
                "drain waits",
                destination=self._destination,
                copies=copies,
                jobs=jobs,
                connections=with_server,
            )
        return True

    @property
    def is_over(self) -> bool:
        """Whether nothing has been with the server for so long that what is left will not end by itself."""
        return self._clock() - self._busy_at >= IDLE_SECONDS


async def end(destination: str, closings: Sequence[tuple[str, Coroutine[Any, Any, object]]]) -> None:
    """Close one thing after the other; one that takes too long, or fails, is told and keeps no other."""
    for what, closing in closings:
        task = asyncio.ensure_future(closing)
        _, late = await asyncio.wait({task}, timeout=CLOSE_SECONDS)
        if late:
            task.cancel()  # and not waited for, since it may not heed that
            maillog.notice("warning", "drain does not wait", destination=destination, reason=what)
        elif not task.cancelled() and (error := task.exception()) is not None:
            logger.opt(exception=error).warning("{}: the end of {} failed", destination, what)
