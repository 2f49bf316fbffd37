"""Fault points: places in the flow of a message where a test stops a process, to kill it or another one there.

With ``SMTPDUP_FAULT=point:n:/path``, the process that reaches the point for the n-th time creates the path and stops
itself (SIGSTOP); once the path exists, no other process stops. Without the variable a point calls an empty function.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

VARIABLE = "SMTPDUP_FAULT"
POINTS = frozenset(
    {
        "before staging",
        "staged",
        "dot sent",
        "leg answered",
        "primary answered",
        "released",
        "before hand-over",
        "handed over",
        "taken from memory",
        "body sent",
        "map written",
        "job fetched",
        "backup answered",
        "before settle",
    }
)


def _nothing(_point: str) -> None:
    """Do nothing."""


def _armed(wanted: str) -> Callable[[str], None]:
    name, count, path = wanted.split(":", 2)
    if name not in POINTS:
        raise ValueError(f"{VARIABLE}: no point {name!r}")
    left = int(count)

    def reach(point: str) -> None:
        nonlocal left
        if point != name:
            return
        left -= 1
        if left == 0:
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGSTOP)

    return reach


reach = _armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _nothing
