"""The background tasks of a relay process: started again after an exception, and ended for certain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from relay import maillog
from relay.repeated import Backoff, until_done

_AGAIN_SECONDS = 1.0
_LOOK_SECONDS = 0.05


def start(work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
    """Run ``work`` in the background until it returns; when it raises, that is logged and it is started again."""

    def trouble(error: Exception) -> None:  # the border: mail continues, and so must this task
        maillog.task_failed(getattr(work, "__qualname__", "task"), error)

    return asyncio.get_running_loop().create_task(until_done(work, trouble, Backoff(_AGAIN_SECONDS, _AGAIN_SECONDS)))


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task until it has ended: asyncio.wait_for() of Python 3.11 may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_LOOK_SECONDS)
