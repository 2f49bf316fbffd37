"""The fork of a child: what it must not inherit of its supervisor, from the fork to its end."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from loguru import logger

from relay import early_signals, log_output, parent_death
from relay.child import ChildContext
from relay.daemon.slots import Child

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)  # what a supervisor hears


def fork(child: Child, context: Callable[[], ChildContext], leave: Callable[[], None]) -> int:
    """Fork a child that runs with a ``context`` made in it, after ``leave`` has closed what is the supervisor's.

    Returns its pid.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal between the fork and the child's own dispositions would be written to our pipe, and a SIGTERM
    # for the child would count as our second one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*SIGNALS, child.leave})
    gc.freeze()  # what all share: no collection of a child looks at it, and so makes a copy of its pages
    pid = os.fork()
    if pid == 0:
        if parent_death.die_with(parent):
            os._exit(0)
        _live(child, context, leave, mask)
    gc.unfreeze()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _live(
    child: Child, context: Callable[[], ChildContext], leave: Callable[[], None], mask: Iterable[int]
) -> NoReturn:
    """Be the child, from here to its end."""
    status = 1
    try:
        leave()
        _become_child(child.leave)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = child.run(context()) if child.run else 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the last border of this process
        logger.exception("{} failed", child.name)
    finally:
        # A signal that a child answers with SystemExit may come even now: it must not get out of here, into what
        # is the supervisor's own code.
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            sys.stdout.flush()
            sys.stderr.flush()
            log_output.flush()
        finally:  # a closed stdout must not change the status
            os._exit(status & 0xFF)


def _become_child(leave: signal.Signals) -> None:
    for number in early_signals.MEANINGLESS:
        signal.signal(number, early_signals.ignore)
    for number in (signal.SIGTERM, signal.SIGCHLD, leave):  # one that has taken nothing yet may just end
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGHUP, signal.SIGINT):  # a reload kills no child that has not asked for it
        signal.signal(number, signal.SIG_IGN)
    os.setpgid(0, 0)  # the terminal's Ctrl-C is for the supervisor, which stops us in our turn
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
