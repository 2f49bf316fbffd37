"""Which relay processes are alive: each holds a flock on a file with its name in the spool as long as it runs.

The kernel releases the lock however the process ends: after SIGKILL it counts as dead at once, under SIGSTOP as alive.
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
    """Take the lock of a relay process; returns its descriptor. Raises OSError if another process holds it."""
    path = folder_of(spool) / owner
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        # An importer is testing the lock, or removed the file between the open and the lock.
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
    """Return whether the relay process with this name runs; a file of another user counts as none."""
    try:
        os.close(private_files.open_locked(folder_of(spool) / owner, os.O_RDONLY, shared=True))
    except BlockingIOError:
        return True
    except (FileNotFoundError, private_files.Foreign):
        return False
    return False


def forget(spool: Path, owner: str) -> None:
    """Remove the lock file of a dead process; that of a living one stays."""
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
