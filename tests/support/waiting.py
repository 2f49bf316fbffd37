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
_LONGEST_PAUSE = 0.2  # seconds
REST = 9  # times as long as a look: whoever waits for what others do leaves them the processor
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
    pauses = _Pauses(interval)
    while not (result := predicate()):
        if pauses.waited > timeout:
            raise AssertionError(_text(message, timeout, predicate))
        time.sleep(pauses.next())
        pauses.look()
    return result


async def until(
    predicate: Callable[[], T], timeout: float = PATIENCE, message: str | Callable[[], str] = "", interval: float = 0.01
) -> T:
    """Like ``wait_until``, for what runs in this event loop."""
    pauses = _Pauses(interval)
    while not (result := predicate()):
        if pauses.waited > timeout:
            raise AssertionError(_text(message, timeout, predicate))
        await asyncio.sleep(pauses.next())
        pauses.look()
    return result


class _Pauses:
    """Pauses between looks: the longer, the longer a look takes, as a command does, and the longer it has been."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._begun = self._looked = time.monotonic()

    @property
    def waited(self) -> float:
        return time.monotonic() - self._begun

    def look(self) -> None:
        """Begin a look."""
        self._looked = time.monotonic()

    def next(self) -> float:
        cost = time.monotonic() - self._looked
        return max(self._interval, min(cost * REST, 1.0), min(self.waited / 20, _LONGEST_PAUSE))


def _text(message: str | Callable[[], str], timeout: float, predicate: object) -> str:
    return f"not within {timeout:g} s: {(message() if callable(message) else message) or predicate}"
