"""The end of the embedded Redis's log after a power cut: zeros, where something was being written.

A file system may have kept a file's new length and not yet what was to be there. Nobody was told that this was kept;
but Redis, which loads a log that ends early, does not start on one that ends in zeros. Only the end of the newest file
is mended: about whatever else is wrong with a log, Redis itself speaks up, and a person decides. A manifest or log that
cannot be read is an OSError.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_FOLDER = "appendonlydir"
_MANIFEST = "appendonly.aof.manifest"
_INCREMENT = re.compile(r"^file (\S+) seq \d+ type i\b", re.MULTILINE)  # the newest is the last
_PIECE = 1 << 16


def cut_zeros(folder: Path) -> int:
    """Cut the zeros off the end of a log that no server writes now, durably; returns how many. Raises OSError.

    What was written whole ends with a line end, so that no zero at the end belongs to anything that was answered.
    """
    try:
        names = _INCREMENT.findall((folder / _FOLDER / _MANIFEST).read_text("utf-8", "replace"))
        descriptor = os.open(folder / _FOLDER / names[-1], os.O_RDWR | os.O_CLOEXEC) if names else -1
    except FileNotFoundError:
        return 0  # a new server, or a case for Redis's own words
    if descriptor < 0:
        return 0
    try:
        size = os.fstat(descriptor).st_size
        end = _end_of_text(descriptor, size)
        if end < size:
            os.ftruncate(descriptor, end)
            os.fsync(descriptor)
        return size - end
    finally:
        os.close(descriptor)


def _end_of_text(descriptor: int, size: int) -> int:
    """Return where the last octet that is no zero ends."""
    while size:
        start = max(0, size - _PIECE)
        piece = os.pread(descriptor, size - start, start).rstrip(b"\0")
        if piece:
            return start + len(piece)
        size = start
    return 0
