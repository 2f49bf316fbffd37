"""Files of the spool that are passed over for a while: one that gives trouble holds up nothing behind it.

Each is tried again, after a minute first, then twice as long each time, up to an hour. The log has one line for a file,
and no more than a hundred an hour for all of them.
"""

from __future__ import annotations

import errno
import time
from typing import NamedTuple

from relay import limits, maillog

_FIRST, _LONGEST = 60.0, 3600.0  # seconds
_LINES = 100  # an hour
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # the trouble of all files


class _Pause(NamedTuple):
    until: float
    seconds: float


def is_of_all(error: Exception) -> bool:
    """Say whether trouble is the disk's, this process's or a connection's, and not one file's."""
    if isinstance(error, ConnectionError | TimeoutError | MemoryError | EOFError):
        return True
    return isinstance(error, OSError) and (error.errno in _DISK or limits.is_own(error))


class Skipped:
    """The files of one spool that are passed over, by name."""

    def __init__(self) -> None:
        self._pauses: dict[str, _Pause] = {}
        self._lines: list[float] = []

    def __contains__(self, name: str) -> bool:
        """Say whether it is not this file's turn as yet."""
        pause = self._pauses.get(name)
        return pause is not None and time.monotonic() < pause.until

    def add(self, name: str, error: Exception) -> None:
        """Pass over a file from now on, for longer than the last time."""
        before = self._pauses.get(name)
        seconds = min(2 * before.seconds, _LONGEST) if before else _FIRST
        self._pauses[name] = _Pause(time.monotonic() + seconds, seconds)
        if before is None:
            self._tell(name, error)

    def retain(self, names: set[str]) -> None:
        """Forget the files that are gone."""
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
