"""Lets the kernel signal a child process when its parent ends in any way (Linux only; elsewhere nothing happens)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
# Loaded here, not in a child between its fork and its exec.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> bool:
    """Have the kernel send ``number`` to this new child when its parent ends; returns whether it has ended already."""
    if _PRCTL is None:
        return False
    _PRCTL(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    return os.getppid() != parent  # it ended before the call
