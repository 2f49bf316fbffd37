"""Programs end with the test run, even when that is killed: nothing that a test started is left behind.

``tied`` is for programs that keep their user: the kernel ends them. The kernel forgets that for a program that
changes its user, as all of Postfix's do; a ``Watchdog`` is for those.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


class Watchdog:
    """A process that kills a process group and deletes a folder when the test run ends without ``dismiss``."""

    def __init__(self, group: int, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCHDOG, str(group), str(directory)],
            stdin=subprocess.PIPE,
            start_new_session=True,  # what ends the test run must not end this
        )

    def dismiss(self) -> None:
        self._process.communicate(b".")
