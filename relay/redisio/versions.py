"""Which server wrote the data of the embedded Redis, and whether another one can read them.

The format of the log changes with the server version: an older server does not start on newer data or, worse, starts
and writes data that the newer one calls damaged. So the server's name and version are recorded beside the data and
compared at the next start. Without a version or a record nothing is checked; Redis itself may report an error.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from relay import private_files

_RECORD = "written-by"
_VERSION = re.compile(r"\b(Redis|Valkey) server v=(\d{1,4})\.(\d{1,4})\b", re.IGNORECASE)
_RECORDED = re.compile(r"(redis|valkey) (\d{1,4})\.(\d{1,4})\n?")
_SECONDS = 5.0
_OLDEST = (7, 0)
_LAST_COMMON = (7, 2)  # the last Redis version whose data Valkey reads


class Version(NamedTuple):
    """A server's name in lower case, and the version numbers that decide its format."""

    name: str
    number: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} {self.number[0]}.{self.number[1]}"

    def reads(self, writer: Version) -> bool:
        """Return whether this server can read data that ``writer`` wrote."""
        if self.name == writer.name:
            return self.number >= writer.number
        return self.name == "valkey" and writer.number <= _LAST_COMMON


def of(program: Path) -> Version | None:
    """Ask a server program for its name and version; None if it does not say."""
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603  (ours)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(answer.stdout.decode("ascii", "replace"))
    return Version(found[1].lower(), (int(found[2]), int(found[3]))) if found else None


def too_old(program: Path, version: Version | None) -> str:
    """Return why this server cannot serve whatever its data are; "" if it can, or has not told its version."""
    if version is None or version.number >= _OLDEST:
        return ""
    return f"{program} is {version}: Redis 7.0 or Valkey 7.2 is the oldest that will do, see redis.program"


def recorded(folder: Path) -> Version | None:
    """Return the server that last wrote the data in this folder, None without a record."""
    try:
        text = (folder / _RECORD).read_text("ascii", "replace")
    except OSError:
        return None
    found = _RECORDED.fullmatch(text)
    return Version(found[1], (int(found[2]), int(found[3]))) if found else None


def record(folder: Path, version: Version | None) -> None:
    """Record which server writes the data from now on. A failure is ignored: it must not prevent the start."""
    if version is not None and version != recorded(folder):
        with suppress(OSError):
            private_files.write(folder, _RECORD, f"{version}\n".encode("ascii"), durable=False)


def objection(folder: Path, program: Path, version: Version | None) -> str:
    """Return why this server must not open the data in this folder, "" if it may."""
    writer = recorded(folder)
    if version is None or writer is None or version.reads(writer):
        return ""
    return (
        f"{program} is {version}, and the data in {folder} are of {writer}, which it cannot read: "
        f"have {writer} or a newer one installed (smtp-dup[embedded] brings one), or set redis.url"
    )
