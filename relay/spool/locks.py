"""Which relay processes live, as seen from the spool: each holds a flock on a file of its name for life.

The kernel gives the lock back whatever ends the process, so a SIGKILL tells at once and a SIGSTOP does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from relay import private_files

_LOCK_SECONDS = 1.0


def folder_of(spool: Path) -> Path:
    """Return the folder of the lock files."""
    return spool / "owners"


def lock(spool: Path, owner: str) -> int:
    """Show that a relay process lives, until the descriptor is closed. Raises OSError when another has that name."""
    path = folder_of(spool) / owner
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = private_files.open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except (FileNotFoundError, BlockingIOError):
            # An importer looks whether we live, or tidied the file away between our open and our lock.
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.01)
        os.close(descriptor)


def is_alive(spool: Path, owner: str) -> bool:
    """Say whether the relay process of that name runs. What another user put there is no process of ours."""
    try:
        descriptor = private_files.open_lock(folder_of(spool) / owner, os.O_RDONLY)
    except (FileNotFoundError, private_files.Foreign):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def forget(spool: Path, owner: str) -> None:
    """Remove the lock file of a process that is dead; a living one keeps it."""
    path = folder_of(spool) / owner
    with contextlib.suppress(OSError):
        descriptor = private_files.open_lock(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
