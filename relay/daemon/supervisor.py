"""The supervisor: one single-threaded parent that starts, watches, restarts and stops all other processes.

It runs no event loop and no thread, so forking is always safe. A child that dies is started again with a
backoff and told who came before it; one that ends with status 2 (bad settings) ends everything, since a
restart cannot help. SIGTERM or SIGINT stop the children stage by stage, each stage drained before the next;
the second such signal kills. A supervisor that is itself killed takes its children along: the kernel sends
them SIGTERM (Linux) and they drain.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from loguru import logger

from relay import log_output
from relay.child import ChildContext

EX_USAGE = 2  # our convention for bad settings
_FIRST_PAUSE = 0.1  # seconds before a restart, doubling
_LONGEST_PAUSE = 10.0
_HEALTHY = 10.0  # a child that lived for so long starts again with the first pause
_IN_A_LOOP = 3  # deaths in a row of a child that lived for less
_TELL_AGAIN_SECONDS = 60.0
_ROSTER_EVERY = 3.0  # seconds between two looks at who else is needed
_REPORT_EVERY = 10.0  # seconds between the lines that say who is still waited for
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Child:
    """One process to keep alive: ``run`` in a fork of ours, or a program that ``launch`` starts.

    ``run`` returns its exit status. ``launch`` may wait until the program answers; it must put it in a process
    group of its own. ``release`` gives back what this process holds for the program: it is called once it has
    ended, and in every fork. Stages stop in ascending and start in descending order. Without ``restart`` a
    child may end by itself; when it ends with another status than 0, so does everything.
    """

    name: str
    run: Callable[[ChildContext], int] | None = None
    launch: Callable[[], subprocess.Popen[bytes]] | None = None
    release: Callable[[subprocess.Popen[bytes]], None] | None = None
    stage: int = 0
    restart: bool = True
    may_be_late: bool = False  # a launch that fails at the first start is tried again as later ones are

    def __post_init__(self) -> None:
        if (self.run is None) == (self.launch is None):
            raise ValueError(f"child {self.name}: either run or launch")


class Vitals:
    """Which children die again and again, told by the supervisor in memory that all its forks share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)

    def tell(self, slots: Iterable[_Slot]) -> None:
        told = {s.child.name: (s.process is not None, s.started) for s in slots if s.deaths >= _IN_A_LOOP}
        text = json.dumps(told).encode()
        if len(text) + 4 <= len(self._memory):
            self._memory[:4] = bytes(4)
            self._memory[4 : 4 + len(text)] = text
            self._memory[:4] = len(text).to_bytes(4, "big")

    def failing(self, prefix: str) -> list[str]:
        """Return the children with such names that have died several times in a row, and have not lived long since."""
        size = int.from_bytes(self._memory[:4], "big")
        try:
            told = json.loads(self._memory[4 : 4 + size] or b"{}")
        except ValueError:  # it is being written
            return []
        now = time.monotonic()
        return sorted(
            n for n, (up, since) in told.items() if n.startswith(prefix) and (not up or now - since < _HEALTHY)
        )


class _Process(Protocol):
    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...


class _Fork:
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


@dataclass(slots=True)
class _Slot:
    """The place of one child: its process while it runs, or when to start it."""

    child: Child
    process: _Process | None = None
    instance: str | None = None
    started: float = 0.0  # monotonic
    due: float | None = None  # monotonic; None: not to be started
    pause: float = _FIRST_PAUSE
    deaths: int = 0  # in a row, each soon after its start
    told: str = ""  # why it could not be started, as it was last said
    told_at: float = 0.0  # monotonic
    is_temporary: bool = False  # from the roster
    is_leaving: bool = False  # told to stop, since the roster has it no more


@dataclass(slots=True)
class Supervisor:
    """Keeps ``children`` running until a signal; see the module's words. Call ``run`` once, in the main thread.

    ``drain_seconds`` bounds the drain of one stage; what is still there then is killed and the status is 1.
    ``roster`` is asked every few seconds which further children there should be: they are started, and stopped when it
    does not name them any more. None from it changes nothing. It must not raise, nor take long.
    """

    children: Sequence[Child]
    drain_seconds: float = 900.0  # longer than the 10 minutes for which a server may answer a final dot
    on_ready: Callable[[], None] | None = None
    roster: Callable[[], Sequence[Child] | None] | None = None
    vitals: Vitals | None = None
    _slots: list[_Slot] = field(init=False, default_factory=list)
    _wakeup: tuple[int, int] = field(init=False, default=(-1, -1))
    # Under nohup the end of the terminal is not ours.
    _at_terminal: bool = field(
        init=False, default_factory=lambda: os.isatty(0) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    )
    _stopping: signal.Signals | None = field(init=False, default=None)
    _status: int = field(init=False, default=0)
    _next_look: float = field(init=False, default=0.0)  # monotonic

    def run(self) -> int:
        """Start the children, keep them running, stop them in order. Returns the exit status.

        An exception of a ``launch`` at the first start is passed on, with everything stopped.
        """
        self._slots = [_Slot(child, due=0.0) for child in sorted(self.children, key=lambda c: -c.stage)]
        before = self._catch_signals()
        try:
            self._start_due(first=True)
            if self.on_ready:
                self.on_ready()
            notify("READY=1")
            self._keep_running()
            notify("STOPPING=1")
            self._stop_in_order()
        finally:
            self._kill_all()
            self._restore_signals(before)
        return self._status

    # Running

    def _keep_running(self) -> None:
        while self._stopping is None and any(s.process or s.due is not None for s in self._slots):
            times = [s.due for s in self._slots if s.due is not None]
            if self.roster:
                times.append(self._next_look)
            self._wait(min(times, default=None))
            self._reap()
            self._call_the_roster()
            self._start_due()
            if self.vitals:
                self.vitals.tell(self._slots)

    def _call_the_roster(self) -> None:
        """Make places for the further children that are needed now, and stop those that are not."""
        if self.roster is None or self._stopping is not None or time.monotonic() < self._next_look:
            return
        wanted = self.roster()
        self._next_look = time.monotonic() + _ROSTER_EVERY
        if wanted is None:
            return
        names = {child.name for child in wanted}
        leaving = [s for s in self._slots if s.is_temporary and not s.is_leaving and s.child.name not in names]
        for slot in leaving:
            slot.is_leaving, slot.due = True, None
        _signal(leaving, signal.SIGTERM)
        self._slots = [s for s in self._slots if s.process or not s.is_leaving]
        here = {slot.child.name for slot in self._slots}
        self._slots += [_Slot(child, due=0.0, is_temporary=True) for child in wanted if child.name not in here]

    def _start_due(self, *, first: bool = False) -> None:
        for slot in self._slots:
            if self._stopping is None and slot.due is not None and slot.due <= time.monotonic():
                try:
                    self._start(slot)
                except Exception as error:  # launch is the caller's
                    if first and not slot.child.may_be_late:
                        raise
                    self._tell_of_failure(slot, str(error))
                    self._plan_restart(slot, 0.0)

    @staticmethod
    def _tell_of_failure(slot: _Slot, text: str) -> None:
        """Say it when it is new, and once a minute as long as it stays the same."""
        now = time.monotonic()
        if text != slot.told or now - slot.told_at >= _TELL_AGAIN_SECONDS:
            slot.told, slot.told_at = text, now
            logger.error("{} cannot be started: {}", slot.child.name, text)

    def _start(self, slot: _Slot) -> None:
        child = slot.child
        predecessor = slot.instance
        slot.started = time.monotonic()
        if child.launch:
            slot.process = child.launch()
            slot.instance = f"{slot.process.pid}.{time.time_ns() // 1_000_000}"
        else:
            begun = time.time_ns() // 1_000_000
            slot.process = _Fork(self._fork(child, begun, predecessor))
            slot.instance = f"{slot.process.pid}.{begun}"
        slot.due = None
        slot.told = ""
        logger.debug("{} started as process {}", child.name, slot.process.pid)

    def _reap(self) -> None:
        """Take note of every child that has ended."""
        for slot in self._slots:
            if slot.process is None or (status := slot.process.poll()) is None:
                continue
            lived = time.monotonic() - slot.started
            pid = slot.process.pid
            self._let_go(slot)
            how = _how(status)
            if self._stopping is not None:
                log = logger.debug if status in {0, -signal.SIGTERM} else logger.warning
                log("{} (process {}) {}", slot.child.name, pid, how)
            elif slot.is_leaving:
                logger.info("{} (process {}) {}: it was not needed any more", slot.child.name, pid, how)
            elif status == EX_USAGE:
                logger.error("{} (process {}) {}: stopping, a restart cannot help", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, EX_USAGE)
            elif slot.child.restart:
                pause = self._plan_restart(slot, lived)
                logger.error("{} (process {}) {}; starting it again in {:.1f} s", slot.child.name, pid, how, pause)
            elif status:
                logger.error("{} (process {}) {}: stopping", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, status if status > 0 else 128 - status)

    @staticmethod
    def _plan_restart(slot: _Slot, lived: float) -> float:
        pause = _FIRST_PAUSE if lived >= _HEALTHY else slot.pause
        slot.deaths = 0 if lived >= _HEALTHY else slot.deaths + 1
        slot.due = time.monotonic() + pause
        slot.pause = min(pause * 2, _LONGEST_PAUSE)
        return pause

    @staticmethod
    def _let_go(slot: _Slot) -> None:
        if slot.child.release and isinstance(slot.process, subprocess.Popen):
            slot.child.release(slot.process)
        slot.process = None

    # Stopping

    def _stop(self, reason: signal.Signals, status: int = 0) -> None:
        if self._stopping is None:
            self._stopping, self._status = reason, status

    def _stop_in_order(self) -> None:
        for stage in sorted({s.child.stage for s in self._slots}):
            slots = [s for s in self._slots if s.child.stage == stage]
            _signal(slots, signal.SIGTERM)
            self._drain(slots)

    def _drain(self, slots: Sequence[_Slot]) -> None:
        deadline = time.monotonic() + self.drain_seconds
        report = time.monotonic() + _REPORT_EVERY
        while True:
            self._reap()
            alive = [s for s in slots if s.process]
            if not alive:
                return
            names = ", ".join(f"{s.child.name} (process {s.process.pid})" for s in alive if s.process)
            now = time.monotonic()
            if now >= deadline:
                logger.error("killed, not drained in {:g} s: {}", self.drain_seconds, names)
                self._status = self._status or 1
                _signal(alive, signal.SIGKILL)
                self._wait_for(alive)
                return
            if now >= report:
                logger.info("waiting for {}", names)
                report = now + _REPORT_EVERY
            self._wait(min(deadline, report))

    def _kill_all(self) -> None:
        _signal(self._slots, signal.SIGKILL)
        self._wait_for(self._slots)

    def _wait_for(self, slots: Iterable[_Slot]) -> None:
        """Wait for killed children."""
        for slot in slots:
            while slot.process and slot.process.poll() is None:
                select.select([], [], [], 0.002)  # not on the pipe: no further signal changes anything
            if slot.process:
                self._let_go(slot)

    # Signals

    def _catch_signals(self) -> dict[signal.Signals, object]:
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        # The handlers do nothing: Python writes each signal's number to the pipe, and _wait reads it there.
        return {number: signal.signal(number, _ignore) for number in _SIGNALS}

    def _restore_signals(self, before: Mapping[signal.Signals, object]) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup:
            os.close(descriptor)

    def _wait(self, until: float | None) -> None:
        """Wait for a signal, at most until a monotonic time, and act on those that came."""
        if log_output.waits():  # there is no thread to write it
            log_output.flush(0.0)
            until = min(until or math.inf, time.monotonic() + _REPORT_EVERY / 10)
        timeout = None if until is None else max(0.0, until - time.monotonic())
        ready, _, _ = select.select([self._wakeup[0]], [], [], timeout)
        numbers = os.read(self._wakeup[0], 4096) if ready else b""
        for number in numbers:
            if number == signal.SIGHUP and not self._terminal_is_gone():
                _signal(self._slots, signal.SIGHUP)
            elif number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                self._on_stop_signal(signal.Signals(number))

    def _terminal_is_gone(self) -> bool:
        if not self._at_terminal:
            return False
        try:
            os.tcgetpgrp(0)
        except OSError:
            return True
        return False

    def _on_stop_signal(self, number: signal.Signals) -> None:
        if self._stopping is not None:
            logger.warning("{} again: killed at once", number.name)
            self._kill_all()
            sys.stdout.flush()
            sys.stderr.flush()
            log_output.flush()
            os._exit(128 + number)
        logger.info("{}: stopping, once more to kill", number.name)
        self._stop(number)

    # The fork

    def _fork(self, child: Child, begun: int, predecessor: str | None) -> int:
        parent = os.getpid()
        prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # loaded here: not in the fork
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal between the fork and the child's own dispositions would be written to our pipe, and a SIGTERM
        # for the child would count as our second one.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        gc.freeze()  # what all share: no collection of a child looks at it, and so makes a copy of its pages
        pid = os.fork()
        if pid == 0:
            if prctl:
                prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
                if os.getppid() != parent:  # it ended before the call
                    os._exit(0)
            self._live(child, ChildContext(child.name, f"{os.getpid()}.{begun}", predecessor), mask)
        gc.unfreeze()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def _live(self, child: Child, context: ChildContext, mask: Iterable[int]) -> NoReturn:
        """Be the child, from here to its end."""
        status = 1
        try:
            self._become_child()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = child.run(context) if child.run else 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # the last border of this process
            logger.exception("{} failed", child.name)
        finally:
            # A signal that a child answers with SystemExit may come even now: it must not get out of here, into what
            # is the supervisor's own code.
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                sys.stdout.flush()
                sys.stderr.flush()
                log_output.flush()
            finally:  # a closed stdout must not change the status
                os._exit(status & 0xFF)

    def _become_child(self) -> None:
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup:
            os.close(descriptor)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for number in (signal.SIGHUP, signal.SIGINT):  # a reload kills no child that has not asked for it
            signal.signal(number, signal.SIG_IGN)
        os.setpgid(0, 0)  # the terminal's Ctrl-C is for the supervisor, which stops us in our turn
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        for slot in self._slots:
            if slot.process:
                self._let_go(slot)


def notify(state: str) -> None:
    """Tell systemd (Type=notify), if it asked to be told; a failure to is ignored."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in {"/", "@"}:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect("\0" + address[1:] if address[0] == "@" else address)
            channel.send(state.encode())


def _signal(slots: Iterable[_Slot], number: signal.Signals) -> None:
    for slot in slots:
        if slot.process and slot.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(slot.process.pid, number)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _ignore(_number: int, _frame: object) -> None:
    pass
