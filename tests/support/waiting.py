"""Waiting for the truth of something with a deadline, and free ports: the only clock that tests use."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LOWEST = 10_000  # of the ports that tests take
PATIENCE = 20.0  # seconds; generous, since it is only ever used up by a failure


def free_port() -> int:
    """Return a loopback port that is free now, and that no outgoing connection is given meanwhile."""
    for _ in range(100):
        port = random.randrange(_LOWEST, _ephemeral())
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@functools.cache
def _ephemeral() -> int:
    """Return the first port that the kernel itself gives out: below it only those who ask for one have it."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text("ascii").split()[0])
    except OSError:  # no Linux: IANA's first one
        first = 49152
    return first if first > _LOWEST + 1000 else 65536


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
