"""A clock that a test sets, for whole processes: a few lines of C that are loaded before libc.

Only the time of day is another; the monotonic clock, time-outs and intervals go on as they do.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from support import preloaded

_SOURCE = Path(__file__).with_suffix(".c")


class SettableClock:
    """The clock of the processes that are started with ``environment``: as many seconds off as ``set`` says."""

    def __init__(self, library: Path, file: Path) -> None:
        file.write_bytes(bytes(8))
        with file.open("r+b") as opened:
            self._seconds = mmap.mmap(opened.fileno(), 8)
        self.environment = {"LD_PRELOAD": str(library), "SETTABLE_CLOCK": str(file)}

    def set(self, seconds: float) -> None:
        """Set it to so many whole seconds ahead of the machine's (or behind), all at once."""
        self._seconds[:] = struct.pack("=q", int(seconds))


def compile_into(folder: Path) -> Path:
    """Return the library. Raises preloaded.NotThere."""
    return preloaded.compiled(_SOURCE, folder)
