"""The end of an event loop with nothing of it left open; and which loops were closed without such an end.

A connection that is being accepted when its loop stops is closed by nobody: what collects it warns of that much later,
in whatever test runs then. ``watch`` has asyncio's own loops looked at as they close; uvloop's complain by themselves.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import selector_events

_left: list[str] = []


async def close(server: asyncio.Server) -> None:
    """Close a server once what it has accepted is a connection; what becomes one later asyncio drops, unclosed."""
    for listening in server.sockets:
        asyncio.get_running_loop().remove_reader(listening)
    for _ in range(3):
        await asyncio.sleep(0)
    server.close()


async def end_all() -> None:
    """End every other task of this loop, and close all its connections, also those that wait for their peer.

    Its servers are closed.
    """
    await asyncio.sleep(0)  # who was accepted last is told of its connection
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    while transports := _open(asyncio.get_running_loop()):
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0)


def watch() -> None:
    """Look at every loop that is closed from now on."""
    close = selector_events.BaseSelectorEventLoop.close

    @functools.wraps(close)
    def look_and_close(loop: selector_events.BaseSelectorEventLoop) -> None:
        if not loop.is_closed():
            _left.extend(f"{what!r}" for what in (*asyncio.all_tasks(loop), *_open(loop)))
        close(loop)

    selector_events.BaseSelectorEventLoop.close = look_and_close


def left_open() -> list[str]:
    """Return the tasks and connections that loops have left behind since this was last asked."""
    found = _left[:]
    _left.clear()
    return found


def _open(loop: asyncio.AbstractEventLoop) -> list[asyncio.Transport]:
    return [transport for transport in [*loop._transports.values()] if transport._sock is not None]
