"""Which relay processes live, as seen from the spool: each holds a flock on a file of its name for life.

The kernel gives the lock back whatever ends the process, so a SIGKILL tells at once and a SIGSTOP does not count.
"""

from __future__ import annotations

import contextlib
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
        # An importer looks whether we live, or tidied the file away between our open and our lock.
        try:
            descriptor = private_files.open_locked(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if _is_at(path, descriptor):
            return descriptor
        os.close(descriptor)


def is_alive(spool: Path, owner: str) -> bool:
    """Say whether the relay process of that name runs. What another user put there is no process of ours."""
    try:
        os.close(private_files.open_locked(folder_of(spool) / owner, os.O_RDONLY, shared=True))
    except BlockingIOError:
        return True
    except (FileNotFoundError, private_files.Foreign):
        return False
    return False


def forget(spool: Path, owner: str) -> None:
    """Remove the lock file of a process that is dead; a living one keeps it."""
    path = folder_of(spool) / owner
    with contextlib.suppress(OSError):
        descriptor = private_files.open_locked(path, os.O_RDONLY)
        try:
            path.unlink()
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
