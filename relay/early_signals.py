"""Signals that reach a start before its supervisor listens for them.

By default each of them would end the process. A hang-up (SIGHUP) is kept: the settings may have been read before it
came, so that they are read again. SIGUSR1 and SIGUSR2 mean nothing to us, now or later. They get handlers, since
SIG_IGN would be inherited by what we start: Redis has a use for them.
"""

from __future__ import annotations

import signal

MEANINGLESS = (signal.SIGUSR1, signal.SIGUSR2)

_kept: list[int] = []


def catch() -> None:
    """Have them end nothing from now on. Where hang-ups are ignored (nohup), they still are."""
    for number in MEANINGLESS:
        signal.signal(number, ignore)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, _keep)


def hung_up() -> bool:
    """Say whether a hang-up was kept, once."""
    came = bool(_kept)
    _kept.clear()
    return came


def ignore(_number: int, _frame: object) -> None:
    """Do nothing: a handler."""


def _keep(number: int, _frame: object) -> None:
    _kept.append(number)
