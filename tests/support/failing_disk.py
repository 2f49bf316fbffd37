"""A disk that fails below one folder, for whole processes: a few lines of C that are loaded before libc."""

from __future__ import annotations

import errno
import mmap
import struct
from pathlib import Path

from support import preloaded

CREATE, WRITE, SYNC, RENAME, UNLINK, READ = (1 << n for n in range(6))

TROUBLES = {
    "a quota, at a new file": (errno.EDQUOT, CREATE),
    "no space, in the middle": (errno.ENOSPC, WRITE),
    "a bad sector": (errno.EIO, WRITE),
    "a bad sector, found by fsync": (errno.EIO, SYNC),
    "no name for it": (errno.ENOSPC, RENAME),
    "mounted read-only": (errno.EROFS, CREATE | WRITE | RENAME | UNLINK),
}


def compile_into(folder: Path) -> Path:
    """Return the library. Raises preloaded.NotThere."""
    return preloaded.compiled(Path(__file__).with_suffix(".c"), folder)


class FailingDisk:
    """The disk of the processes that are started with ``environment``: well, until ``fail``."""

    def __init__(self, library: Path, file: Path, below: Path) -> None:
        file.write_bytes(bytes(8))
        with file.open("r+b") as opened:
            self._plan = mmap.mmap(opened.fileno(), 8)
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAILING_DISK": str(file),
            "FAILING_DISK_BELOW": str(below),
        }

    def fail(self, error: int, what: int) -> None:
        """Have these operations fail with this error number, from now on."""
        self._plan[:] = struct.pack("=ii", error, what)

    def mend(self) -> None:
        self.fail(0, 0)
