"""The log of the embedded Redis before it starts: whether it is whole, and its end after a power cut.

A Redis that finds no manifest begins an empty log, whatever lies beside it, and one whose manifest names less than is
there loads less, in silence. So what is there is compared with what is named, and nothing starts that would forget.

After a power cut the end may be zeros, where something was being written. A file system may have kept a file's new
length and not yet what was to be there. Nobody was told that this was kept; but Redis, which loads a log that ends
early, does not start on one that ends in zeros. Only the end of the newest file is mended: about whatever else is wrong
within a log, Redis itself speaks up, and a person decides. A manifest or log that cannot be read is an OSError.
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
_EMPTY = 256  # octets; the base of a log that has nothing in it has less, and that of a ledger always more
_PIECE = 1 << 16


def objection(folder: Path) -> str:
    """Say why no server may start on this folder: it would forget what is there. "" when it may. Raises OSError."""
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
    # A base that is not named is one that a rewrite was about to finish; but there is always one that is.
    kinds = ".incr." if "b" in named.values() else ""
    unnamed = [p for p in _data(manifest.parent) if kinds in p.name and p.name not in named]
    if unnamed:
        return f"{manifest} does not name {unnamed[0].name}, which has data: bring back the manifest, {way_out}"
    return ""


def fingerprint(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Return what tells whether somebody has changed the data since: names, sizes and times of the files."""
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
    """Return files with data where somebody may have put them: our folder, one level below, one above."""
    places = [folder, *sorted(p for p in folder.glob("*") if p.is_dir()), folder.parent, folder.parent / _FOLDER]
    found = [path for place in places for path in _data(place)]
    # Killed at its very first start, before the manifest was written.
    return [] if all(path.name.endswith(".base.rdb") and path.stat().st_size <= _EMPTY for path in found) else found


def _data(place: Path) -> list[Path]:
    """Return the files of a log, or of a snapshot, that are not empty; not what Redis was still writing."""
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
