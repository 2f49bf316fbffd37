"""The housekeeping process: the scheduler, the reconciler and the status server, each in a thread, until a stop signal.

They wait most of the time, so they share one process. If a task ends or raises before the stop, the process ends with
status 1, and the supervisor starts it again.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping

from loguru import logger

from relay.stopping import StopEvent

_STOP = (signal.SIGTERM, signal.SIGINT)

Task = Callable[[StopEvent], None]  # runs until the event is set


def housekeep(tasks: Mapping[str, Task]) -> int:
    """Run each task in a thread of its name until SIGTERM or SIGINT, then wait for all. Returns the exit status."""
    stop = StopEvent()
    failed = threading.Event()

    def run(name: str, task: Task) -> None:
        try:
            task(stop)
        except Exception:  # the border of the thread
            logger.exception("{} failed", name)
        if not stop.is_set():
            failed.set()
            os.kill(os.getpid(), signal.SIGTERM)

    # Blocked in all threads, so that sigwait gets them: no handler, no race between the flag and the wait.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    threads = [threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in tasks.items()]
    for thread in threads:
        thread.start()
    signal.sigwait(_STOP)
    stop.set()
    for thread in threads:
        thread.join()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return int(failed.is_set())
