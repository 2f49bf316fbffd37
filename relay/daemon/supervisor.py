"""The supervisor: one single-threaded parent that starts, watches, restarts and stops all other processes.

It runs no event loop and no thread, so forking is always safe. A child that dies is started again with a
backoff and told who came before it; one that ends with status 2 (bad settings) ends everything, since a
restart cannot help. SIGTERM or SIGINT stop the children stage by stage, each stage drained before the next;
the second such signal kills. A supervisor that is itself killed takes its children along: the kernel sends
them SIGTERM (Linux) and they drain.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from loguru import logger

from relay import log_output
from relay.child import ChildContext
from relay.daemon.fork import SIGNALS, fork
from relay.daemon.slots import Child, Fork, Slot, ending, send
from relay.daemon.vitals import Vitals

__all__ = ["Child", "Supervisor", "notify"]

EX_USAGE = 2  # our convention for bad settings
_TELL_AGAIN_SECONDS = 60.0
_ROSTER_EVERY = 3.0  # seconds between two looks at who else is needed
_REPORT_EVERY = 10.0  # seconds between the lines that say who is still waited for


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
    _slots: list[Slot] = field(init=False, default_factory=list)
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
        self._slots = [Slot(child, due=0.0) for child in sorted(self.children, key=lambda c: -c.stage)]
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
        send(leaving, signal.SIGTERM)
        self._slots = [s for s in self._slots if s.process or not s.is_leaving]
        here = {slot.child.name for slot in self._slots}
        self._slots += [Slot(child, due=0.0, is_temporary=True) for child in wanted if child.name not in here]

    def _start_due(self, *, first: bool = False) -> None:
        for slot in self._slots:
            if self._stopping is None and slot.due is not None and slot.due <= time.monotonic():
                try:
                    self._start(slot)
                except Exception as error:  # launch is the caller's
                    if first and not slot.child.may_be_late:
                        raise
                    self._tell_of_failure(slot, str(error))
                    slot.plan_restart(0.0)

    @staticmethod
    def _tell_of_failure(slot: Slot, text: str) -> None:
        """Say it when it is new, and once a minute as long as it stays the same."""
        now = time.monotonic()
        if text != slot.told or now - slot.told_at >= _TELL_AGAIN_SECONDS:
            slot.told, slot.told_at = text, now
            logger.error("{} cannot be started: {}", slot.child.name, text)

    def _start(self, slot: Slot) -> None:
        child = slot.child
        predecessor = slot.instance
        slot.started = time.monotonic()
        if child.launch:
            slot.process = child.launch()
            slot.instance = f"{slot.process.pid}.{time.time_ns() // 1_000_000}"
        else:
            begun = time.time_ns() // 1_000_000
            slot.process = Fork(self._fork(child, begun, predecessor))
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
            slot.let_go()
            how = ending(status)
            if self._stopping is not None:
                log = logger.debug if status in {0, -signal.SIGTERM} else logger.warning
                log("{} (process {}) {}", slot.child.name, pid, how)
            elif slot.is_leaving:
                logger.info("{} (process {}) {}: it was not needed any more", slot.child.name, pid, how)
            elif status == EX_USAGE:
                logger.error("{} (process {}) {}: stopping, a restart cannot help", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, EX_USAGE)
            elif slot.child.restart:
                pause = slot.plan_restart(lived)
                logger.error("{} (process {}) {}; starting it again in {:.1f} s", slot.child.name, pid, how, pause)
            elif status:
                logger.error("{} (process {}) {}: stopping", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, status if status > 0 else 128 - status)

    # Stopping

    def _stop(self, reason: signal.Signals, status: int = 0) -> None:
        if self._stopping is None:
            self._stopping, self._status = reason, status

    def _stop_in_order(self) -> None:
        for stage in sorted({s.child.stage for s in self._slots}):
            slots = [s for s in self._slots if s.child.stage == stage]
            send(slots, signal.SIGTERM)
            self._drain(slots)

    def _drain(self, slots: Sequence[Slot]) -> None:
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
                send(alive, signal.SIGKILL)
                self._wait_for(alive)
                return
            if now >= report:
                logger.info("waiting for {}", names)
                report = now + _REPORT_EVERY
            self._wait(min(deadline, report))

    def _kill_all(self) -> None:
        send(self._slots, signal.SIGKILL)
        self._wait_for(self._slots)

    def _wait_for(self, slots: Iterable[Slot]) -> None:
        """Wait for killed children."""
        for slot in slots:
            while slot.process and slot.process.poll() is None:
                select.select([], [], [], 0.002)  # not on the pipe: no further signal changes anything
            if slot.process:
                slot.let_go()

    # Signals

    def _catch_signals(self) -> dict[signal.Signals, object]:
        self._wakeup = os.pipe()
        for descriptor in self._wakeup:
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        # The handlers do nothing: Python writes each signal's number to the pipe, and _wait reads it there.
        return {number: signal.signal(number, _ignore) for number in SIGNALS}

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
                send(self._slots, signal.SIGHUP)
            elif number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                self._on_stopsend(signal.Signals(number))

    def _terminal_is_gone(self) -> bool:
        if not self._at_terminal:
            return False
        try:
            os.tcgetpgrp(0)
        except OSError:
            return True
        return False

    def _on_stopsend(self, number: signal.Signals) -> None:
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
        return fork(child, lambda: ChildContext(child.name, f"{os.getpid()}.{begun}", predecessor), self._leave)

    def _leave(self) -> None:
        """Close what a fork has of the supervisor's."""
        signal.set_wakeup_fd(-1)
        for descriptor in self._wakeup:
            os.close(descriptor)
        for slot in self._slots:
            if slot.process:
                slot.let_go()


def notify(state: str) -> None:
    """Tell systemd (Type=notify), if it asked to be told; a failure to is ignored."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] in {"/", "@"}:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect("\0" + address[1:] if address[0] == "@" else address)
            channel.send(state.encode())


def _ignore(_number: int, _frame: object) -> None:
    pass
