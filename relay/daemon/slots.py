"""The places of children: what each is, its process while it runs, and when it is started again."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from relay.child import ChildContext
from relay.daemon.signs_of_life import SignOfLife

# What is stopped first has the lowest number: no new mail, then no delivery, then what both need.
RELAY_STAGE, WORKERS_STAGE, AROUND_STAGE, REDIS_STAGE = range(4)

IN_A_LOOP = 3  # deaths in a row of a child that lived for less
HEALTHY = 10.0  # a child that lived for so long starts again with the first pause
_FIRST_PAUSE = 0.1  # seconds before a restart, doubling
_LONGEST_PAUSE = 10.0


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep alive: ``run`` in a fork of ours, or a program that ``launch`` starts.

    ``run`` returns its exit status. ``launch`` may wait until the program answers; it must put it in a process
    group of its own. ``release`` gives back what this process holds for the program: it is called once it has
    ended, and in every fork. Stages stop in ascending and start in descending order. Without ``restart`` a
    child may end by itself; when it ends with another status than 0, so does everything.

    ``prepare`` is called with the seat of a ``run`` before its fork, ``bury`` with it after its end. A child of a
    ``generation`` leaves, told by ``leave``, when a later one has come; one of generation 0 outlives them all.
    """

    name: str
    run: Callable[[ChildContext], int] | None = None
    launch: Callable[[], subprocess.Popen[bytes]] | None = None
    release: Callable[[subprocess.Popen[bytes]], None] | None = None
    stage: int = 0
    restart: bool = True
    may_be_late: bool = False  # a launch that fails at the first start is tried again as later ones are
    prepare: Callable[[int], None] | None = None
    bury: Callable[[int], None] | None = None
    generation: int = 0
    leave: signal.Signals = signal.SIGTERM

    def __post_init__(self) -> None:
        if (self.run is None) == (self.launch is None):
            raise ValueError(f"child {self.name}: either run or launch")


class Process(Protocol):
    """What runs in a slot: a fork, or a program."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class Fork:
    """A forked child, with the part of Popen's face that is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status


@dataclass(slots=True, eq=False)
class Slot:
    """The place of one child: its process while it runs, or when to start it."""

    child: Child
    process: Process | None = None
    instance: str | None = None
    started: float = 0.0  # monotonic
    due: float | None = None  # monotonic; None: not to be started
    pause: float = _FIRST_PAUSE
    deaths: int = 0  # in a row, each soon after its start
    told: str = ""  # why it could not be started, as it was last said
    told_at: float = 0.0  # monotonic
    seat: int = 0  # see ChildContext
    sign: SignOfLife | None = None  # of a fork that runs
    stands_still: bool = False  # it gives no sign of life
    is_ready: bool = False
    is_temporary: bool = False  # from the roster
    is_leaving: bool = False  # told to go: the roster or the settings have it no more
    leave_by: float = math.inf  # monotonic; then it is killed

    def plan_restart(self, lived: float) -> float:
        """Have it started again after a pause, which is returned: the longer, the more often it has died."""
        pause = _FIRST_PAUSE if lived >= HEALTHY else self.pause
        self.deaths = 0 if lived >= HEALTHY else self.deaths + 1
        self.due = time.monotonic() + pause
        self.pause = min(pause * 2, _LONGEST_PAUSE)
        return pause

    def let_go(self) -> None:
        """Give back what this process holds for the child's."""
        if self.child.release and isinstance(self.process, subprocess.Popen):
            self.child.release(self.process)
        if self.sign:
            self.sign.close()
        self.process, self.sign, self.is_ready, self.stands_still = None, None, False, False


def send(slots: Iterable[Slot], number: signal.Signals) -> None:
    """Send a signal to the processes that run."""
    for slot in slots:
        if slot.process and slot.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(slot.process.pid, number)


def ending(status: int) -> str:
    """Say how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
