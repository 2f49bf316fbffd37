"""Whose files are believed: our own user's and root's; and when we are root, those of whoever owns the state folder.

Who may write to a file of passwords or keys decides who may log in, where mail goes and what it is sealed with. In a
user namespace (a rootless container) the owner of what root of the host has mounted has no number: nobody in there
can be that user, and so it is believed.
"""

from __future__ import annotations

import functools
import os
import stat
from pathlib import Path

_trusted = {0}


def trust(folder: Path) -> None:
    """Take the owner of the state folder, or of another that the settings name, for one of us when we are root."""
    if os.geteuid() == 0 and folder.is_dir():
        _trusted.add(folder.stat().st_uid)


def is_ours(uid: int) -> bool:
    """Say whether what this user owns may be believed."""
    return uid == os.geteuid() or uid in _trusted


def fault_of_secret(path: Path, found: os.stat_result | None = None) -> str:
    """Say what is wrong with who may write to a file of passwords or keys, and what to do; "" for nothing.

    Raises OSError where there is no such file.
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
    """Return the number that stands for all users who are not in our user namespace, -1 where all are."""
    try:
        first, *_, count = Path("/proc/self/uid_map").read_text("ascii").split()
        if first == "0" and int(count) >= 0xFFFFFFFF:
            return -1
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError):
        return -1
