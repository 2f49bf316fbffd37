"""Programs end with the test run, even when that is killed: nothing that a test started is left behind.

``tied`` is for programs that keep their user: the kernel ends them. The kernel forgets that for a program that
changes its user, as all of Postfix's do; a ``Daemon``, with its watchdog, is for those.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from support.waiting import PATIENCE

# Not a preexec_fn: a test run has threads, and running Python between fork and exec is not safe then.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)\n"  # 1: PR_SET_PDEATHSIG
    "if os.getppid() == int(sys.argv[2]):\n"
    "    os.execvp(sys.argv[3], sys.argv[3:])\n"
)
# One octet on the pipe says that all is well; its end without one says that the test run is dead.
_WATCHDOG = (
    "import os, shutil, signal, sys\n"
    "if not os.read(0, 1):\n"
    "    os.killpg(int(sys.argv[1]), signal.SIGKILL)\n"
    "    shutil.rmtree(sys.argv[2], ignore_errors=True)\n"
)


def tied(argv: list[str], signal_number: int = signal.SIGKILL) -> list[str]:
    """Return a command that runs ``argv`` under the same process id, signalled when this thread ends (Linux only).

    Start it from the main thread: the kernel looks at the thread, not at the process.
    """
    if sys.platform != "linux":
        return argv
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(signal_number)), str(os.getpid()), *argv]


class Daemon:
    """A started program that leads a process group; the group and its folder go when the test run ends before it."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process = process
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG, str(process.pid), str(directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what ends the test run must not end this
        )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def stop(self, signal_number: int = signal.SIGTERM, *, group: bool = False) -> None:
        """Stop it, by this signal to it or to its whole group, and by SIGKILL to the group if that takes too long."""
        if group:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)
        else:
            self._process.send_signal(signal_number)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._watchdog.communicate(b".")

    def pause(self) -> None:
        """Let it hang."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)
