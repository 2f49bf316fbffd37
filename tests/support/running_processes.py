"""Which processes run, as /proc tells (elsewhere than on Linux: ps, which knows no threads).

A process runs while one of its threads does. After a SIGKILL its first thread may be a zombie long before the last one,
which is busy with the disk, has come to its end: until then all its files are open, what it listens on among them.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A process that has not ended."""

    pid: int
    parent: int
    session: int


def running() -> Iterator[Running]:
    """Return all of them."""
    if sys.platform != "linux":
        yield from _from_ps()
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (found := find(int(entry.name))):
            yield found


def of_session(session: int) -> list[int]:
    """Return the processes of a session, which is called by the pid of its first one."""
    return [process.pid for process in running() if process.session == session]


def find(pid: int) -> Running | None:
    """Return this process; None if it has ended, even if nobody has reaped it yet."""
    try:
        # The name in parentheses may hold anything; what follows it is regular.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, parent, session, threads = fields[0], int(fields[1]), int(fields[3]), int(fields[17])
    return Running(pid, parent, session) if state not in {"Z", "X"} or threads > 1 else None


def kill(pids: Iterable[int]) -> None:
    """Kill processes, whoever's they are, and wait for their ends."""
    with ExitStack() as ends:
        poll = select.poll()
        count = 0
        for pid in pids:
            with suppress(ProcessLookupError):
                if sys.platform == "linux":
                    ends.callback(os.close, descriptor := os.pidfd_open(pid))
                    poll.register(descriptor, select.POLLIN)
                    count += 1
                os.kill(pid, signal.SIGKILL)
        while count:
            for descriptor, _ in poll.poll():
                poll.unregister(descriptor)
                count -= 1


def is_running(pid: int) -> bool:
    return find(pid) is not None


def command_line(pid: int) -> str:
    """Return a process's arguments; nothing if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return ""


def _from_ps() -> Iterator[Running]:
    lines = subprocess.run(["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True)
    for line in lines.stdout.splitlines():
        pid, parent, state = line.split()
        if not state.startswith("Z"):
            with suppress(ProcessLookupError):
                yield Running(int(pid), int(parent), os.getsid(int(pid)))
