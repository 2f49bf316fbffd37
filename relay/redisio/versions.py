"""Which server has written the data of the embedded Redis, and whether another can read them.

The format of the log grows with the server: an older one does not start on what a newer one has written, or, worse,
starts and writes what the newer one then calls damaged. So the name and version of the server are kept beside the data,
and the next start compares. A server that does not say its version, or data without a record, are not judged: Redis
speaks up itself.
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
_LAST_COMMON = (7, 2)  # of Redis: what it wrote, Valkey reads


class Version(NamedTuple):
    """A server's name, in small letters, and the numbers that decide about its format."""

    name: str
    number: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} {self.number[0]}.{self.number[1]}"

    def reads(self, writer: Version) -> bool:
        """Say whether this server reads what that one has written."""
        if self.name == writer.name:
            return self.number >= writer.number
        return self.name == "valkey" and writer.number <= _LAST_COMMON


def of(program: Path) -> Version | None:
    """Ask a server program which it is."""
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603  (ours)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION.search(answer.stdout.decode("ascii", "replace"))
    return Version(found[1].lower(), (int(found[2]), int(found[3]))) if found else None


def recorded(folder: Path) -> Version | None:
    """Return which server has last written the data in this folder."""
    try:
        text = (folder / _RECORD).read_text("ascii", "replace")
    except OSError:
        return None
    found = _RECORDED.fullmatch(text)
    return Version(found[1], (int(found[2]), int(found[3]))) if found else None


def record(folder: Path, version: Version | None) -> None:
    """Note which server writes the data from now on. What cannot be noted keeps nothing from starting."""
    if version is not None and version != recorded(folder):
        with suppress(OSError):
            private_files.write(folder, _RECORD, f"{version}\n".encode("ascii"), durable=False)


def objection(folder: Path, program: Path, version: Version | None) -> str:
    """Say why this server may not open the data in this folder; "" when it may."""
    writer = recorded(folder)
    if version is None or writer is None or version.reads(writer):
        return ""
    return (
        f"{program} is {version}, and the data in {folder} are of {writer}, which it cannot read: "
        f"have {writer} or a newer one installed (smtp-dup[embedded] brings one), or set redis.url"
    )
