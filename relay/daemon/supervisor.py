"""The supervisor: one single-threaded parent that starts, watches, restarts and stops all other processes.

It runs no event loop and no thread, so forking is always safe. A child that dies is started again with a
backoff and told who came before it; one that ends with status 2 (bad settings) ends everything, since a
restart cannot help. SIGTERM or SIGINT stop the children stage by stage, each stage drained before the next;
the second such signal kills. A supervisor that is itself killed takes its children along: the kernel sends
them SIGTERM (Linux) and they drain.

With new settings (``renew``) a further generation of children is started beside the one that runs. When all of it is
ready the former is told to leave, finishes what it has in hand and ends; when one of it dies first, it leaves itself.
"""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from loguru import logger

from relay import early_signals, log_output
from relay.child import ChildContext
from relay.daemon.child_status import ChildStatus
from relay.daemon.fork import fork
from relay.daemon.notify import notify
from relay.daemon.renewal import Renewal, Roster
from relay.daemon.signs_of_life import SignOfLife
from relay.daemon.slots import Child, Fork, Slot, ending, send
from relay.daemon.standstill import Standstill
from relay.daemon.wakeup import Wakeup

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
    on_reload: Callable[[], None] | None = None  # SIGHUP; without it the children are told
    roster: Roster | None = None
    child_status: ChildStatus = field(default_factory=ChildStatus)
    generation: int = field(init=False, default=1)
    _slots: list[Slot] = field(init=False, default_factory=list)
    _wakeup: Wakeup = field(init=False, default_factory=Wakeup)
    _renewal: Renewal | None = field(init=False, default=None)
    # Under nohup the end of the terminal is not ours.
    _at_terminal: bool = field(
        init=False, default_factory=lambda: os.isatty(0) and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    )
    _stopping: signal.Signals | None = field(init=False, default=None)
    _status: int = field(init=False, default=0)
    _standstill: Standstill = field(init=False, default_factory=Standstill)
    _next_look: float = field(init=False, default=0.0)  # monotonic; at who else is needed

    def run(self) -> int:
        """Start the children, keep them running, stop them in order. Returns the exit status.

        An exception of a ``launch`` at the first start is passed on, with everything stopped.
        """
        self._slots = [Slot(child, due=0.0) for child in sorted(self.children, key=lambda c: -c.stage)]
        before = self._wakeup.catch_signals()
        if early_signals.hung_up():
            signal.raise_signal(signal.SIGHUP)
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
            self._wakeup.restore_signals(before)
        return self._status

    # What others ask of it while it runs, from a callback of its own

    def watch(self, descriptor: int, callback: Callable[[], None]) -> None:
        """Call back whenever something can be read; it must not raise. A fork closes the descriptor."""
        self._wakeup.watched[descriptor] = callback

    def forget(self, descriptor: int) -> None:
        self._wakeup.watched.pop(descriptor, None)

    def renew(self, renewal: Renewal) -> None:
        """Begin to put the children of new settings in the place of those that run; one renewal at a time."""
        self._renewal = renewal
        self._slots += renewal.slots

    def tell_children(self) -> None:
        """Have the children read again the files that they read again: certificates, users, keys."""
        send(self._slots, signal.SIGHUP)

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None

    @property
    def slots(self) -> Sequence[Slot]:
        return tuple(self._slots)

    # Running

    def _keep_running(self) -> None:
        while self._stopping is None and any(s.process or s.due is not None for s in self._slots):
            times = [s.due for s in self._slots if s.due is not None]
            times += [s.leave_by for s in self._slots if s.is_leaving]
            if self.roster:
                times.append(self._next_look)
            if self._renewal:
                times.append(self._renewal.deadline)
            times.append(self._standstill.next_look)
            self._wait(min(times, default=math.inf))
            self._reap()
            self._standstill.look(self._slots)
            self._call_the_roster()
            self._start_due()
            self._go_on_renewing()
            self._kill_who_stays()
            self.child_status.tell(self._slots)

    def _call_the_roster(self) -> None:
        """Make places for the further children that are needed now, and stop those that are not."""
        if self.roster is None or self._stopping is not None or time.monotonic() < self._next_look:
            return
        wanted = self.roster()
        self._next_look = time.monotonic() + _ROSTER_EVERY
        if wanted is None:
            return
        names = {child.name for child in wanted}
        self._dismiss([s for s in self._slots if s.is_temporary and not s.is_leaving and s.child.name not in names])
        here = {slot.child.name for slot in self._slots if not slot.is_leaving}
        self._slots += [Slot(child, due=0.0, is_temporary=True) for child in wanted if child.name not in here]

    def _go_on_renewing(self) -> None:
        """End the renewal where it has come to an end: all new children are ready, or one of them is in trouble."""
        renewal = self._renewal
        if renewal is None:
            return
        if trouble := renewal.find_trouble():
            self._dismiss(renewal.slots)
        elif renewal.is_complete:
            former = [s for s in self._slots if s not in renewal.slots and (s.child.generation or s.is_temporary)]
            self.generation, self.roster, self._next_look = renewal.generation, renewal.roster, 0.0
            self._dismiss([s for s in former if not s.is_leaving])
        else:
            return
        self._renewal = None
        renewal.ended(trouble)

    def _dismiss(self, slots: Sequence[Slot]) -> None:
        """Have children leave: they finish what they have in hand, and are not started again."""
        for slot in slots:
            slot.is_leaving, slot.due, slot.leave_by = True, None, time.monotonic() + self.drain_seconds
            send([slot], slot.child.leave)
        self._forget_who_has_gone()

    def _forget_who_has_gone(self) -> None:
        self._slots = [s for s in self._slots if s.process or not s.is_leaving]

    def _kill_who_stays(self) -> None:
        for slot in self._slots:
            if slot.is_leaving and slot.process and time.monotonic() >= slot.leave_by:
                name, pid = slot.child.name, slot.process.pid
                logger.error("{} (process {}) killed, not drained in {:g} s", name, pid, self.drain_seconds)
                send([slot], signal.SIGKILL)
                slot.leave_by = math.inf

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
        slot.started = time.monotonic()
        begun = time.time_ns() // 1_000_000
        if child.launch:
            slot.process = child.launch()
        else:
            if slot.instance is None:
                taken = {s.seat for s in self._slots if s.child.name == child.name and s.instance is not None}
                slot.seat = next(n for n in range(len(taken) + 1) if n not in taken)
            if child.prepare:
                child.prepare(slot.seat)
            slot.sign = SignOfLife()
            slot.process = Fork(self._fork(slot, begun, slot.sign))
        slot.instance = f"{slot.process.pid}.{begun}"
        slot.due = None
        slot.told = ""
        # Told before any that it replaces could take what it does for what is left behind.
        self.child_status.tell(self._slots)
        logger.debug("{} started as process {}", child.name, slot.process.pid)

    def _reap(self) -> None:
        """Take note of every child that has ended."""
        for slot in self._slots:
            if slot.process is None or (status := slot.process.poll()) is None:
                continue
            lived = time.monotonic() - slot.started
            pid = slot.process.pid
            slot.let_go()
            if slot.child.bury:
                slot.child.bury(slot.seat)
            how = ending(status)
            if self._stopping is not None:
                log = logger.debug if status in {0, -signal.SIGTERM} else logger.warning
                log("{} (process {}) {}", slot.child.name, pid, how)
            elif slot.is_leaving:
                log = logger.info if status in {0, -slot.child.leave} else logger.error
                log("{} (process {}) {}: it was not needed any more", slot.child.name, pid, how)
            elif self._renewal and slot in self._renewal.slots:
                self._renewal.trouble = f"{slot.child.name} (process {pid}) {how}"
            elif status == EX_USAGE:
                logger.error("{} (process {}) {}: stopping, a restart cannot help", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, EX_USAGE)
            elif slot.child.restart:
                pause = slot.plan_restart(lived)
                logger.error("{} (process {}) {}; starting it again in {:.1f} s", slot.child.name, pid, how, pause)
            elif status:
                logger.error("{} (process {}) {}: stopping", slot.child.name, pid, how)
                self._stop(signal.SIGTERM, status if status > 0 else 128 - status)
        self._forget_who_has_gone()

    # Stopping

    def _stop(self, reason: signal.Signals, status: int = 0) -> None:
        if self._stopping is None:
            self._stopping, self._status = reason, status
            if self._renewal:
                self._renewal.ended("it is being stopped")
                self._renewal = None

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

    def _wait(self, until: float) -> None:
        """Wait for a signal or what is watched, at most until a monotonic time, and act on what came."""
        if log_output.waits():  # there is no thread to write it
            log_output.flush(0.0)
            until = min(until, time.monotonic() + _REPORT_EVERY / 10)
        signals, pids, descriptors = self._wakeup.wait(until)
        for slot in self._slots:
            if slot.process and slot.process.pid in pids:
                slot.is_ready = True
        for number in signals:
            if number == signal.SIGHUP and not self._terminal_is_gone():
                self._reload()
            elif number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
                self._on_stop_signal(signal.Signals(number))
        for descriptor in descriptors:
            if callback := self._wakeup.watched.get(descriptor):  # another callback may have put an end to it
                callback()

    def _reload(self) -> None:
        if self.on_reload and self._stopping is None:
            self.on_reload()
        else:
            self.tell_children()

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

    def _fork(self, slot: Slot, begun: int, sign: SignOfLife) -> int:
        child, predecessor = slot.child, slot.instance

        def context() -> ChildContext:
            return ChildContext(
                child.name,
                f"{os.getpid()}.{begun}",
                predecessor,
                generation=child.generation or 1,
                seat=slot.seat,
                ready=self._wakeup.tell_ready,
                lives=sign.give,
                living=partial(self.child_status.living, child.name),
            )

        return fork(child, context, self._leave)

    def _leave(self) -> None:
        """Close what a fork has of the supervisor's."""
        self._wakeup.leave()
        for slot in self._slots:
            if slot.process:
                slot.let_go()
