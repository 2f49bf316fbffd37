"""Files of the spool that are skipped for a while after a failure, so that they do not hold up the others.

Each is tried again after a minute, then after twice as long each time, up to an hour. The log gets one line for each
file, and at most a hundred an hour for all of them.
"""

from __future__ import annotations

import errno
import time
from typing import NamedTuple

from relay import limits, maillog

_FIRST, _LONGEST = 60.0, 3600.0  # seconds
_LINES = 100  # an hour
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors that concern all files


class _Pause(NamedTuple):
    until: float
    seconds: float


def is_of_all(error: Exception) -> bool:
    """Return whether an error concerns the disk, this process or a connection, and not a single file."""
    if isinstance(error, ConnectionError | TimeoutError | MemoryError | EOFError):
        return True
    return isinstance(error, OSError) and (error.errno in _DISK or limits.is_own(error))


class Skipped:
    """The skipped files of one spool, by name."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}
        self._lines: list[float] = []

    def __contains__(self, name: str) -> bool:
        """Return whether this file is to be skipped now."""
        pause = self._pauses.get(name)
        return pause is not None and time.monotonic() < pause.until

    def add(self, name: str, error: Exception) -> None:
        """Skip a file from now on, for twice as long as the last time."""
        before = self._pauses.get(name)
        seconds = min(2 * before.seconds, _LONGEST) if before else _FIRST
        self._pauses[name] = _Pause(time.monotonic() + seconds, seconds)
        if before is None:
            self._tell(name, error)

    def retain(self, names: set[str]) -> None:
        """Forget all files except these."""
        for name in self._pauses.keys() - names:
            del self._pauses[name]

    def _tell(self, name: str, error: Exception) -> None:
        now = time.monotonic()
        self._lines = [at for at in self._lines if now - at < _LONGEST]
        if len(self._lines) < _LINES:
            self._lines.append(now)
            maillog.spool_trouble(name, error)
            if len(self._lines) == _LINES:
                maillog.notice("error", "more files of the spool give trouble: they are passed over", told=_LINES)
