"""Programs that end with the test run, even when that is killed: nothing that a test started is left behind."""

from __future__ import annotations

import os
import signal
import sys

# Not a preexec_fn: a test run has threads, and running Python between fork and exec is not safe then.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)\n"  # 1: PR_SET_PDEATHSIG
    "if os.getppid() == int(sys.argv[2]):\n"
    "    os.execvp(sys.argv[3], sys.argv[3:])\n"
)


def tied(argv: list[str], signal_number: int = signal.SIGKILL) -> list[str]:
    """Return a command that runs ``argv`` under the same process id, signalled when this thread ends (Linux only).

    Start it from the main thread: the kernel looks at the thread, not at the process.
    """
    if sys.platform != "linux":
        return argv
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(signal_number)), str(os.getpid()), *argv]
