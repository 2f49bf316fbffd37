"""What a child is told when its parent ends, however that ends: by the kernel, where it can (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
# Loaded here, not in a child between its fork and its exec.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> bool:
    """Have the kernel signal this process, a new child, when its parent ends; says whether it is too late for that."""
    if _PRCTL is None:
        return False
    _PRCTL(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return os.getppid() != parent  # it ended before the call
