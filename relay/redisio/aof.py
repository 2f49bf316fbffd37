"""Checks the append-only log of the embedded Redis before it starts, and repairs its end after a power cut.

Without a manifest, Redis silently begins an empty log, even if data files are there; with a manifest that names too few
files, it silently loads less. So the files present are compared with those named, and Redis is not started if it would
lose data.

After a power cut the log may end in zeros: the file system kept the new length of a file, but not the data. No client
got a reply for such a write. Redis loads a truncated log, but refuses one that ends in zeros. Only the end of the
newest file is repaired: other damage within a log is reported by Redis itself, and the operator decides. A manifest or
log that cannot be read raises OSError.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_FOLDER = "appendonlydir"
_MANIFEST = "appendonly.aof.manifest"
_INCREMENT = re.compile(r"^file (\S+) seq \d+ type i\b", re.MULTILINE)  # the newest is the last
_LINE = re.compile(r"file (\S+) seq \d+ type ([bih])\b.*")
_OLD_LOG = "appendonly.aof"  # before Redis 7, in one piece: Redis takes it over
_DATA = (".aof", ".rdb")
_EMPTY = 256  # octets; the base file of an empty log is smaller, that of a ledger always larger
_PIECE = 1 << 16


def objection(folder: Path) -> str:
    """Return why a server started on this folder would lose data, "" if it would not. Raises OSError."""
    manifest = folder / _FOLDER / _MANIFEST
    way_out = f"or move what is in {folder} away to begin with an empty ledger"
    if not manifest.exists():
        found = _data_without_manifest(folder)
        if not found or found == [folder / _OLD_LOG]:
            return ""
        return (
            f"{manifest} is missing, but {found[0]} has data: bring back {manifest.parent.name} as a whole, {way_out}"
        )
    text = manifest.read_text("utf-8", "replace")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    named = {match[1]: match[2] for line in lines if (match := _LINE.fullmatch(line))}
    if not named or len(named) < len(lines) or not text.endswith("\n"):
        return f"{manifest} is empty or damaged: bring it back from a backup, {way_out}"
    files = [manifest, *(manifest.parent / name for name, kind in named.items() if kind != "h")]
    for path in files:
        if not path.is_file():
            return f"{manifest} names {path.name}, which is missing: bring it back from a backup, {way_out}"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"{path} cannot be read and written: it belongs to user {path.stat().st_uid}, we are {os.geteuid()}"
    # A base file that is not named is left by an unfinished rewrite; but one must be named.
    kinds = ".incr." if "b" in named.values() else ""
    unnamed = [p for p in _data(manifest.parent) if kinds in p.name and p.name not in named]
    if unnamed:
        return f"{manifest} does not name {unnamed[0].name}, which has data: bring back the manifest, {way_out}"
    return ""


def fingerprint(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Return names, sizes and times of the data files, to detect that they have been changed."""
    found = set()
    for path in [*_entries(folder), *_entries(folder / _FOLDER)]:
        if path.suffix in {*_DATA, ".manifest"}:
            with suppress(OSError):
                status = path.stat()
                found.add((path.name, status.st_size, status.st_ctime_ns))
    return frozenset(found)


def _entries(place: Path) -> list[Path]:
    try:
        return list(place.iterdir())
    except OSError:
        return []


def _data_without_manifest(folder: Path) -> list[Path]:
    """Return files with data where an operator may have put them: in this folder, one level below, one above."""
    places = [folder, *sorted(p for p in folder.glob("*") if p.is_dir()), folder.parent, folder.parent / _FOLDER]
    found = [path for place in places for path in _data(place)]
    # Redis was killed at its first start, before it wrote the manifest.
    return [] if all(path.name.endswith(".base.rdb") and path.stat().st_size <= _EMPTY for path in found) else found


def _data(place: Path) -> list[Path]:
    """Return the files of a log or a snapshot that are not empty, without Redis's temporary files."""
    try:
        files = sorted(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        path
        for path in files
        if path.suffix in _DATA and not path.name.startswith("temp-") and path.is_file() and path.stat().st_size
    ]


def cut_zeros(folder: Path) -> int:
    """Cut the zeros off the end of the log of a stopped server, durably; returns how many. Raises OSError.

    A complete write ends with a line end, so no trailing zero belongs to a write that was answered.
    """
    try:
        names = _INCREMENT.findall((folder / _FOLDER / _MANIFEST).read_text("utf-8", "replace"))
        descriptor = os.open(folder / _FOLDER / names[-1], os.O_RDWR | os.O_CLOEXEC) if names else -1
    except FileNotFoundError:
        return 0  # a new server, or a fault that Redis reports itself
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
    """Return the offset after the last octet that is not zero."""
    while size:
        start = max(0, size - _PIECE)
        piece = os.pread(descriptor, size - start, start).rstrip(b"\0")
        if piece:
            return start + len(piece)
        size = start
    return 0
