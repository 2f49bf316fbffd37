"""Waiting for the truth of something with a deadline, and free ports: the only clock that tests use."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 20.0  # seconds; generous, since it is only ever used up by a failure


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    predicate: Callable[[], T], timeout: float = PATIENCE, message: str | Callable[[], str] = "", interval: float = 0.02
) -> T:
    """Call predicate until it returns something true, and return that. Fails the test at the deadline."""
    deadline = time.monotonic() + timeout
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(_text(message, timeout, predicate))
        time.sleep(interval)
    return result


async def until(
    predicate: Callable[[], T], timeout: float = PATIENCE, message: str | Callable[[], str] = "", interval: float = 0.01
) -> T:
    """Like ``wait_until``, for what runs in this event loop."""
    deadline = time.monotonic() + timeout
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(_text(message, timeout, predicate))
        await asyncio.sleep(interval)
    return result


def _text(message: str | Callable[[], str], timeout: float, predicate: object) -> str:
    return f"not within {timeout:g} s: {(message() if callable(message) else message) or predicate}"
