"""What a soak does to the product and to the servers around it: kills and stalls of every part, chosen by a seed.

``Disturber.step`` does one thing and returns how long to let it work; ``end`` undoes whatever lasts. A product that has
ended by itself is started again, as a service manager does. Only processes that are children of our own product are
ever signalled.
"""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support.product import Product

_STARTED = re.compile(rb'"event": "(\S+) started as process (\d+)"')
_PATIENCE = 30.0
_READY_SECONDS = 90.0


class Disturbance(NamedTuple):
    """One thing that was done, when (seconds since the epoch), and the processes that it ended."""

    at: float
    what: str
    ended: tuple[int, ...] = ()


@dataclass(slots=True)
class Server:
    """A recording server and the pipe on which it is told its mood."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    refuses: bool = False  # some mail for good

    def turn(self, mood: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(mood.encode() + b"\n")
        self.process.stdin.flush()


@dataclass(slots=True)
class Parts:
    """The processes of a product by name, as its supervisor's log names them."""

    product: Product
    _offset: int = 0
    _pids: dict[str, int] = field(default_factory=dict)

    def forget(self) -> None:
        """Look only at what is said from now on: another supervisor is started."""
        self._pids.clear()
        self._offset = self.product.log_file.stat().st_size if self.product.log_file.exists() else 0

    def named(self, pattern: str) -> dict[str, int]:
        """Return those that run now, their names matching the pattern."""
        with self.product.log_file.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        end = new.rfind(b"\n") + 1
        self._offset += end
        self._pids |= {name.decode(): int(pid) for name, pid in _STARTED.findall(new[:end])}
        return {n: pid for n, pid in sorted(self._pids.items()) if re.match(pattern, n) and self._is_ours(pid)}

    def _is_ours(self, pid: int) -> bool:
        process = self.product.process
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return process is not None and int(fields[1]) == process.pid and fields[0] != "Z"


class Disturber:
    """Chooses and does; ``told`` is called with each disturbance."""

    def __init__(self, product: Product, servers: list[Server], seed: int, told: Callable[[Disturbance], None]) -> None:
        self._product = product
        self._parts = Parts(product)
        self._servers = servers
        self._source = random.Random(seed)
        self._told = told
        self._undo: list[tuple[float, str, Callable[[], None]]] = []
        self._old: list[Product] = []  # what a dead supervisor has left draining
        self._acts: list[tuple[int, Callable[[], None]]] = [
            (6, lambda: self._kill("relay-")),
            (6, lambda: self._kill("worker-")),
            (3, lambda: self._kill("housekeeping")),
            (4, lambda: self._kill("redis")),
            (3, lambda: self._stall("relay-")),
            (3, lambda: self._stall("worker-")),
            (3, lambda: self._stall("redis")),
            (1, lambda: self._stall("housekeeping")),
            (1, self._stall_supervisor),
            (2, self._kill_everything),
            (2, self._kill_supervisor),
            (1, self._restart),
            (6, lambda: self._upset(self._servers[:1])),  # whichever is the primary now
            (8, lambda: self._upset(self._servers[1:])),
        ]

    def step(self) -> float:
        """Do the next thing; returns the seconds to the one after it."""
        weights = [weight for weight, _ in self._acts]
        (_, act) = self._source.choices(self._acts, weights)[0]
        act()
        return self._source.uniform(0.2, 2.0)

    def look(self) -> None:
        """End what has lasted long enough, and start a product that has ended."""
        now = time.monotonic()
        due = [entry for entry in self._undo if entry[0] <= now]
        self._undo = [entry for entry in self._undo if entry[0] > now]
        for _, _, undo in due:
            undo()
        if not self._product.is_running:
            self._say("started again by the service manager")
            self._start()

    def end(self) -> None:
        """Undo everything that lasts, and see the product ready. Raises AssertionError when it does not get so."""
        for _, _, undo in self._undo:
            undo()
        self._undo = []
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            try:
                self.look()
                self._product.wait_ready(5)
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            else:
                return

    def stop(self) -> None:
        """Undo everything that lasts, and end the product and what dead supervisors of it have left draining."""
        self.end()
        process = self._product.process
        assert process is not None
        self._say("stopped")
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._say(f"not drained in {_PATIENCE:g} s: killed", *self._parts.named("").values())
        self._product.kill()
        self.clean_up()

    def start(self) -> None:
        """Start the product again, with the settings that it has now."""
        self._start()

    def clean_up(self) -> None:
        """Leave nothing behind of supervisors that were killed."""
        for old in self._old:
            old.clean_up()

    # What is done

    def _say(self, what: str, *ended: int) -> None:
        self._told(Disturbance(time.time(), what, ended))

    def _signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _one(self, pattern: str) -> tuple[str, int] | None:
        """Return one of the running parts; the choice is made even when there is none, for the seed's sake."""
        choice = self._source.random()
        found = list(self._parts.named(pattern).items())
        return found[int(choice * len(found))] if found else None

    def _kill(self, pattern: str) -> None:
        if part := self._one(pattern):
            self._say(f"{part[0]} killed", part[1])
            self._signal(part[1], signal.SIGKILL)

    def _stall(self, pattern: str) -> None:
        seconds = self._source.choice((0.2, 1.0, 2.5, 5.0))
        if part := self._one(pattern):
            self._say(f"{part[0]} stalled for {seconds:g} s")
            self._freeze(part[1], seconds)

    def _freeze(self, pid: int, seconds: float) -> None:
        self._signal(pid, signal.SIGSTOP)
        is_ours = self._parts._is_ours  # noqa: SLF001 - the product's own parts

        def thaw() -> None:
            process = self._product.process
            if is_ours(pid) or (process is not None and process.pid == pid):
                self._signal(pid, signal.SIGCONT)

        self._undo.append((time.monotonic() + seconds, "", thaw))

    def _stall_supervisor(self) -> None:
        seconds = self._source.choice((0.2, 1.0, 2.5))
        if self._product.process is not None and self._product.is_running:
            self._say(f"supervisor stalled for {seconds:g} s")
            self._freeze(self._product.process.pid, seconds)

    def _kill_everything(self) -> None:
        self._say("everything killed", *self._parts.named("").values())
        self._product.kill()
        time.sleep(self._source.choice((0.0, 0.5, 2.0)))
        self._start()

    def _kill_supervisor(self) -> None:
        """Its children drain by themselves; another is started now, or a little later."""
        pause = self._source.choice((0.0, 1.0, 4.0))
        process = self._product.process
        if process is None or not self._product.is_running:
            return
        left = self._parts.named("").values()
        self._say(f"supervisor killed, started after {pause:g} s", *left)
        for pid in left:
            self._signal(pid, signal.SIGCONT)  # the kernel's SIGTERM must reach them
        process.kill()
        process.wait()
        self._old.append(copy.copy(self._product))
        time.sleep(pause)
        self._start()

    def _restart(self) -> None:
        process = self._product.process
        if process is None or not self._product.is_running:
            return
        self._say("stopped and started")
        for pid in (process.pid, *self._parts.named("").values()):
            self._signal(pid, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._say(f"not drained in {_PATIENCE:g} s: killed", *self._parts.named("").values())
            self._product.kill()
        self._start()

    def _start(self) -> None:
        self._parts.forget()
        self._product.start(wait=False)

    def _upset(self, servers: list[Server]) -> None:
        server = self._source.choice(servers)
        mood = self._source.choice(("down", "tempfail", "greylist", "busy", "reset", "slow", "stall"))
        seconds = self._source.uniform(0.3, 6.0)
        if any(name == server.name for _, name, _ in self._undo):
            return  # one thing at a time
        self._say(f"{server.name}: {mood} for {seconds:.1f} s")
        if mood == "stall":
            server.process.send_signal(signal.SIGSTOP)
            undo = lambda: server.process.send_signal(signal.SIGCONT)  # noqa: E731 - one of two
        else:
            server.turn(mood)
            undo = lambda: server.turn("well")  # noqa: E731 - one of two
        self._undo.append((time.monotonic() + seconds, server.name, undo))
