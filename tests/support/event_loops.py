"""Runs an async test on asyncio's own loop and on uvloop, and fails it when the loop reports an unhandled error.

What a test opens it must close, or hand to ``at_end``: a transport that is left open makes uvloop's loop hang at its
end where warnings are errors.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

at_end: list[Callable[[], object]] = []  # called in the test's loop when it is over


def both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make an async test function a test that runs once on each kind of loop."""

    @pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    @functools.wraps(test)
    def run(*args: Any, new_loop: Callable[[], asyncio.AbstractEventLoop], **kwargs: Any) -> None:
        reported: list[dict[str, Any]] = []
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: reported.append(context))
            try:
                runner.run(test(*args, **kwargs))
            finally:
                runner.run(_end())
            gc.collect()  # a future whose error nobody looked at reports when it goes
        assert not reported, reported

    signature = inspect.signature(test)
    parameter = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), parameter])
    return run


async def _end() -> None:
    while at_end:
        at_end.pop()()
    for _ in range(3):  # what a close schedules, and what that schedules
        await asyncio.sleep(0)
