"""Waiting for the truth of something with a deadline, and free ports: the only clock that tests use."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import os
import random
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_LOWEST = 10_000  # of the ports that tests take
_KEPT = 300  # ports of one process
_ours: deque[int] = deque()
PATIENCE = 40.0  # seconds; generous, since it is only ever used up by a failure


def free_port() -> int:
    """Return a loopback port that is free now, that no outgoing connection is given, and that no other test run takes.

    The last few hundred stay ours, in use or not: a server that is down must not be found up.
    """
    for _ in range(1000):
        port = random.randrange(_LOWEST, _ephemeral())
        if port in _ours or not _reserve(port):
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            _ours.append(port)
            if len(_ours) > _KEPT:
                fcntl.lockf(_ports(), fcntl.LOCK_UN, 1, _ours.popleft())
            return port
        fcntl.lockf(_ports(), fcntl.LOCK_UN, 1, port)
    raise AssertionError("no free port")


def _reserve(port: int) -> bool:
    # An octet's lock is the process's: it ends with it, and a child does not inherit it.
    try:
        fcntl.lockf(_ports(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@functools.cache
def _ports() -> int:
    """Return a file of which every test process of this user locks one octet for each port: one descriptor for all."""
    path = Path(tempfile.gettempdir(), f"smtp-dup-test-ports-{os.getuid()}")
    return os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


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
    begun = time.monotonic()
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(_text(message, timeout, predicate))
        time.sleep(_pause(interval, begun))
        begun = time.monotonic()
    return result


async def until(
    predicate: Callable[[], T], timeout: float = PATIENCE, message: str | Callable[[], str] = "", interval: float = 0.01
) -> T:
    """Like ``wait_until``, for what runs in this event loop."""
    deadline = time.monotonic() + timeout
    begun = time.monotonic()
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(_text(message, timeout, predicate))
        await asyncio.sleep(_pause(interval, begun))
        begun = time.monotonic()
    return result


def _pause(interval: float, begun: float) -> float:
    """Return the pause after a look that began then: what takes long, as a command does, is looked at less often."""
    return max(interval, min(3 * (time.monotonic() - begun), 1.0))


def _text(message: str | Callable[[], str], timeout: float, predicate: object) -> str:
    return f"not within {timeout:g} s: {(message() if callable(message) else message) or predicate}"
