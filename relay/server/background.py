"""The background tasks of a relay process: started again after an exception, and ended for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from relay import maillog

_AGAIN_SECONDS = 1.0
_LOOK_SECONDS = 0.05


def start(work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Run ``work`` in the background until it returns; when it raises, that is logged and it is started again."""
    return asyncio.get_running_loop().create_task(_for_ever(work))


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: asyncio.wait_for() of Python 3.11 may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_LOOK_SECONDS)


async def _for_ever(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            return await work()
        except Exception as error:  # the border: mail continues, and so must this task
            maillog.task_failed(getattr(work, "__qualname__", "task"), error)
        await asyncio.sleep(_AGAIN_SECONDS)
