"""Whose files are trusted: those of this process's user and of root; for root also those of the state folder's owner.

Whoever can write a file of passwords or keys decides who may log in, where mail goes and which key seals it. In a user
namespace (a rootless container), files mounted by root of the host belong to the overflow uid: no process in the
container can be that user, so its secrets are trusted.
"""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path

_trusted = {0}


def trust(folder: Path) -> None:
    """If this process is root, trust the owner of the state folder or of another folder in the settings."""
    if os.geteuid() == 0 and folder.is_dir():
        _trusted.add(folder.stat().st_uid)


def is_ours(uid: int) -> bool:
    """Return whether files of this user are trusted."""
    return uid == os.geteuid() or uid in _trusted


def fault_of_secret(path: Path, found: os.stat_result | None = None) -> str:
    """Return why the owner or mode of a secret file is unsafe, and what to do, "" if it is safe.

    Raises OSError if there is no such file.
    """
    found = found or path.stat()
    if not stat.S_ISREG(found.st_mode):
        return ""
    if not is_ours(found.st_uid) and found.st_uid != _nobody():
        return f"{path} belongs to user {found.st_uid}: chown it to root or to the user of this service"
    if found.st_mode & 0o022:
        return f"{path} can be written by others (mode {found.st_mode & 0o777:04o}): chmod go-w"
    return ""


@functools.cache
def _nobody() -> int:
    """Return the overflow uid, which stands for users outside of this user namespace; -1 if there are none."""
    try:
        first, *_, count = Path("/proc/self/uid_map").read_text("ascii").split()
        if first == "0" and int(count) >= 0xFFFFFFFF:
            return -1
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError):
        return -1
