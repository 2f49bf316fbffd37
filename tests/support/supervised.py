"""A supervisor of the product in a process of its own, with children that note what happens to them."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path

from support import forked
from support.forked import ForkedProcess
from support.running_processes import is_running
from support.waiting import wait_until

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from relay.daemon.slots import Child
from relay.daemon.supervisor import Supervisor

folder = Path(sys.argv[1])

def note(line):
    with (folder / "events").open("a") as events:
        events.write(line + "\\n")

def serve(context):
    "A child that drains, unless it is stubborn."
    signals = {signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    note(f"up {context.name} {os.getpid()} {context.predecessor}")
    while signal.sigwait(signals) == signal.SIGHUP:
        note(f"reload {context.name}")
    note(f"term {context.name}")
    while (folder / "stubborn").exists():
        signal.pause()
    note(f"down {context.name}")
    return 0
"""


class Run:
    """A supervisor under test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: ForkedProcess | None = None

    def start(self, program: str, **environment: str) -> ForkedProcess:
        """Run a program, which has the prelude's words."""
        (self.folder / "program.py").write_text(PRELUDE + textwrap.dedent(program))
        with (self.folder / "log").open("wb") as log:
            self.process = forked.start(
                [str(self.folder / "program.py"), str(self.folder)],
                cwd=Path.cwd(),
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    @property
    def events(self) -> list[list[str]]:
        path = self.folder / "events"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ups(self, name: str) -> list[tuple[int, str]]:
        """Return (pid, predecessor) of each start of a child."""
        return [(int(e[2]), e[3]) for e in self.events if e[:2] == ["up", name]]

    def wait_up(self, name: str, count: int = 1) -> list[tuple[int, str]]:
        wait_until(lambda: len(self.ups(name)) >= count, message=lambda: self.log)
        return self.ups(name)

    def end(self, timeout: float = 20) -> int:
        """Wait for its end, and return its status."""
        assert self.process is not None
        return self.process.wait(timeout)

    def clean_up(self) -> None:
        """Leave no process behind."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for event in self.events:
            if event[0] == "up" and is_running(int(event[2])):
                os.kill(int(event[2]), signal.SIGKILL)
