"""The spool: messages as files while Redis is down, full or slow; importer.py moves them into the ledger.

    messages/<id>-<octets>.tmp      half written
    messages/<id>-<octets>.staged   the packed record, on stable storage before the primary sees the dot
    messages/<id>-<octets>.ready    the primary accepted: its copies are due
    messages/<id>-<octets>.held     no reply from the primary: uncertain
    messages/<id>.release, .discard notes about a message in Redis, for changes that Redis did not confirm
    backlog/<backup>/<id>-...ready  the same file (a hard link), once only that backup's copy has to be imported
    owners/<owner>                  locked (flock) by the living relay process of that name; SIGKILL frees the lock
    corrupt/                        files that cannot be read, kept for the operator
    unfinished/                     half written when a process was killed, before any 2xx

A change is a rename in one folder, durable after the fsync of that folder, which many changes share. A write
that cannot be durable (disk full, ``min_free``, I/O error) raises OSError. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote

from relay import private_files
from relay.gathering import Gathering
from relay.ledger.changes import Released
from relay.mail.ids import is_destination_name, is_id
from relay.spool import locks

TMP, STAGED, READY, HELD = "tmp", "staged", "ready", "held"
RELEASE, DISCARD = "release", "discard"
_FLIGHTS = 8  # groups written at once: a file system's journal commits them together
_GROUP_BYTES = 1 << 20
_STATES = {TMP, STAGED, READY, HELD}
_NOTES = {RELEASE, DISCARD}


class Entry(NamedTuple):
    """One file of ``messages``; ``size`` is the octets of the record by the file's name, 0 for a note."""

    id: str
    name: str
    state: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class SpoolSummary:
    """The numbers of a spool. ``backlogs`` has the number of files in each backup's backlog."""

    messages: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0
    corrupt: int = 0
    unfinished: int = 0
    backlogs: dict[str, int] = field(default_factory=dict)


def messages(folder: Path) -> Path:
    """Return the folder of the messages."""
    return folder / "messages"


def backlog(folder: Path, destination: str) -> Path:
    """Return the folder of the messages that wait for this backup only."""
    return folder / "backlog" / f"to-{quote(destination, safe='')}"


def backlogs(folder: Path) -> list[str]:
    """Return the backups that have a backlog folder. Raises OSError."""
    found = {name: unquote(name.removeprefix("to-")) for name in names(folder / "backlog") if name.startswith("to-")}
    return sorted(backup for backup in found.values() if is_destination_name(backup))


def names(folder: Path) -> list[str]:
    """Return the names in a folder, unordered, [] if there is no such folder. Raises OSError."""
    try:
        with os.scandir(folder) as found:
            return [file.name for file in found if not file.name.startswith(".")]
    except FileNotFoundError:
        return []


def prepare(folder: Path) -> None:
    """Create the private folders, or close those that other users could write to. Raises Foreign, OSError."""
    private_files.folder(folder, is_named=True)
    for name in ("messages", "backlog", "owners", "corrupt", "unfinished"):
        private_files.folder(folder / name)
    for changed in (folder, folder.parent):
        sync(changed)


def sync(folder: Path) -> None:
    """Put the names in a folder on stable storage (fsync). Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scan(folder: Path) -> list[Entry]:
    """Return every file of ``messages``, oldest first: ids are ordered by time. Raises OSError."""
    return sorted(entry_of(name) for name in names(messages(folder)))


def entry_of(name: str) -> Entry:
    """Parse the name of a file."""
    stem, _, state = name.rpartition(".")
    message_id, _, size = stem.partition("-")
    is_size = size.isascii() and size.isdigit() and len(size) < 20
    if is_id(message_id):
        if state in _NOTES and not size:
            return Entry(message_id, name, state)
        if state == TMP or (state in _STATES and is_size):
            return Entry(message_id, name, state, int(size) if is_size else 0)
    return Entry(message_id, name, "")  # not a file that smtp-dup made


def summary(folder: Path | None) -> SpoolSummary:
    """Count what is in a spool; one that is off or was never used is empty. Raises OSError."""
    if folder is None:
        return SpoolSummary()
    waiting = {e: messages(folder) for e in scan(folder) if e.state in {STAGED, READY, HELD}}
    counts: dict[str, int] = {}
    for backup in backlogs(folder):
        place = backlog(folder, backup)
        entries = [entry_of(name) for name in names(place)]
        if entries:
            counts[backup] = len(entries)
        # Several links to one file are one message, which is counted once.
        waiting |= dict.fromkeys(entries, place)
    age = 0.0
    for entry in sorted(waiting):
        with contextlib.suppress(FileNotFoundError):  # it has just been imported
            age = max(0.0, time.time() - (waiting[entry] / entry.name).stat().st_mtime)
            break
    corrupt, unfinished = (len(names(folder / name)) for name in ("corrupt", "unfinished"))
    return SpoolSummary(len(waiting), sum(e.size for e in waiting), round(age, 1), corrupt, unfinished, counts)


# One process's side -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Change:
    """A change to be made in a thread; durable when ``done``."""

    work: Callable[[], None]
    size: int
    done: asyncio.Future[None]


class Spool:
    """The writer of one relay process. Folders are created when first needed, so that a bad disk stops nothing else."""

    def __init__(self, folder: Path, owner: str, min_free: int = 0) -> None:
        self._folder = folder
        self._owner = owner
        self._min_free = min_free
        self._pool = ThreadPoolExecutor(_FLIGHTS, thread_name_prefix="spool")
        self._opening = asyncio.Lock()
        self._lock = -1
        self._messages = -1
        self._mine: dict[str, str] = {}  # id -> stem of its file, until the primary has replied
        self._noted: set[str] = set()
        self._gathering = Gathering(self._begin, flights=_FLIGHTS, octets=_GROUP_BYTES)
        self._flights: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Create the folders and take this process's lock. Raises OSError."""
        if self._messages < 0:
            async with self._opening:
                if self._messages < 0:
                    await asyncio.get_running_loop().run_in_executor(self._pool, self._open)

    async def close(self) -> None:
        """Finish the changes under way and release the lock; the importer gets the remaining files."""
        await self._gathering.drain()
        await asyncio.get_running_loop().run_in_executor(self._pool, self._close)
        self._pool.shutdown()

    async def write(self, message_id: str, record: bytes) -> None:
        """Put a packed message on stable storage. Raises OSError; then ``discard`` removes what may be left."""
        await self.open()
        self._mine[message_id] = stem = f"{message_id}-{len(record)}"
        await self._change(lambda: self._put(stem, STAGED, record, self._min_free), len(record))

    async def release(self, message_id: str) -> bool:
        """Mark a message as accepted, durably; returns False if it is not in the spool. Raises OSError."""
        return await self._end(message_id, lambda stem: self._rename(stem, READY))

    async def hold(self, message_id: str) -> bool:
        """Mark a message as uncertain, durably; returns False if it is not in the spool. Raises OSError."""
        return await self._end(message_id, lambda stem: self._rename(stem, HELD))

    async def discard(self, message_id: str) -> bool:
        """Delete a message, durably; returns False if it is not in the spool. Raises OSError."""
        return await self._end(message_id, lambda stem: self._remove(f"{stem}.{TMP}", f"{stem}.{STAGED}"))

    def has(self, message_id: str) -> bool:
        """Return whether a message of this process may be in the spool, not yet released, held or discarded."""
        return message_id in self._mine

    async def note_release(self, released: Released) -> None:
        """Note that a message staged in Redis was accepted, in case this process dies first. Raises OSError."""
        await self._note(released.id, RELEASE, json.dumps(released._asdict()).encode("ascii"))

    async def note_discard(self, message_id: str) -> None:
        """Note that a message staged in Redis was refused. Raises OSError."""
        await self._note(message_id, DISCARD, b"{}")

    async def strike(self, message_id: str) -> None:
        """Remove the notes about a message, since Redis has confirmed the change. Raises OSError."""
        if message_id in self._noted:
            await self._change(lambda: self._remove(f"{message_id}.{RELEASE}", f"{message_id}.{DISCARD}"))
            self._noted.discard(message_id)

    # In the loop

    async def _end(self, message_id: str, work: Callable[[str], None]) -> bool:
        stem = self._mine.get(message_id)
        if stem is None:
            return False
        await self._change(lambda: work(stem))
        self._mine.pop(message_id, None)
        return True

    async def _note(self, message_id: str, kind: str, text: bytes) -> None:
        await self.open()
        self._noted.add(message_id)
        await self._change(lambda: self._put(message_id, kind, text, 0), len(text))

    async def _change(self, work: Callable[[], None], size: int = 0) -> None:
        """Do something in a thread, grouped with other changes; durable on return. Raises OSError."""
        change = _Change(work, size, asyncio.get_running_loop().create_future())
        self._gathering.add(change)
        await change.done

    def _begin(self, group: list[_Change]) -> None:
        task = asyncio.get_running_loop().create_task(self._fly(group))
        self._flights.add(task)
        task.add_done_callback(self._land)

    def _land(self, task: asyncio.Task[None]) -> None:
        self._flights.discard(task)
        self._gathering.landed()

    async def _fly(self, group: list[_Change]) -> None:
        errors: list[OSError | None]
        try:
            errors = await asyncio.get_running_loop().run_in_executor(self._pool, self._do, group)
        except Exception as error:  # no thread, no memory: the waiting callers get it
            errors = [OSError(errno.ENOMEM, str(error) or "no memory")] * len(group)
        for change, trouble in zip(group, errors, strict=True):
            if change.done.done():
                continue
            if trouble is None:
                change.done.set_result(None)
            else:
                change.done.set_exception(trouble)

    # In a thread

    def _do(self, group: list[_Change]) -> list[OSError | None]:
        errors: list[OSError | None] = []
        for change in group:
            try:
                change.work()
                errors.append(None)
            except OSError as error:
                errors.append(error)
        try:
            os.fsync(self._messages)
        except OSError as error:
            return [error] * len(group)
        return errors

    def _open(self) -> None:
        prepare(self._folder)
        if self._lock < 0:
            self._lock = locks.lock(self._folder, self._owner)
        self._messages = os.open(messages(self._folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _close(self) -> None:
        for descriptor in (self._messages, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._messages = self._lock = -1

    def _put(self, stem: str, state: str, data: bytes, reserve: int) -> None:
        if reserve:
            disk = os.fstatvfs(self._messages)
            if disk.f_bavail * disk.f_frsize - len(data) < reserve:
                raise OSError(errno.ENOSPC, "less than spool.min_free would be left", str(self._folder))
        private_files.write_at(self._messages, f"{stem}.{state}", data, f"{stem}.{TMP}")

    def _rename(self, stem: str, state: str) -> None:
        before, after = f"{stem}.{STAGED}", f"{stem}.{state}"
        try:
            os.rename(before, after, src_dir_fd=self._messages, dst_dir_fd=self._messages)
        except FileNotFoundError:
            # A repetition after a failed fsync: the rename is done, and the file may have been imported since.
            return

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._messages)
