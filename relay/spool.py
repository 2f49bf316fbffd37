"""The spool: messages as files, for when Redis is down, full or slow; relay/importer.py moves them into the ledger.

    messages/<id>-<octets>.tmp      half written
    messages/<id>-<octets>.staged   the packed record, on stable storage before the primary sees the dot
    messages/<id>-<octets>.ready    the primary accepted: its copies are due
    messages/<id>-<octets>.held     no reply from the primary: uncertain
    messages/<id>.release, .discard notes about a message in Redis, which Redis could not be told
    owners/<owner>                  flock'd by the living relay process of that name, so that a SIGKILL frees it
    corrupt/                        what cannot be read, set aside for a person

A change is a rename in one folder, durable after the fsync of that folder, which many changes share. A write
that cannot be durable (disk full, ``min_free``, I/O error) raises OSError. Nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from relay.ledger import Released

T = TypeVar("T")

TMP, STAGED, READY, HELD = "tmp", "staged", "ready", "held"
RELEASE, DISCARD = "release", "discard"
_THREADS = 4  # fsyncs at once; a journal commits what is waiting together
_LOCK_SECONDS = 1.0
_STATES = {TMP, STAGED, READY, HELD}
_NOTES = {RELEASE, DISCARD}


class Entry(NamedTuple):
    """One file of ``messages``; ``size`` is that of the record as its name tells it, 0 for a note."""

    id: str
    name: str
    state: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """The spool at a glance."""

    messages: int = 0
    bytes: int = 0
    oldest_age_s: float = 0.0
    corrupt: int = 0


def messages(folder: Path) -> Path:
    """Return the folder of the messages."""
    return folder / "messages"


def prepare(folder: Path) -> None:
    """Make the folders, private to us. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in ("messages", "owners", "corrupt"):
        (folder / name).mkdir(exist_ok=True, mode=0o700)
    for changed in (folder, folder.parent):
        sync(changed)


def sync(folder: Path) -> None:
    """Put the names in a folder on stable storage. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scan(folder: Path) -> list[Entry]:
    """Return every file of ``messages``, oldest first: ids are ordered by time. Raises OSError."""
    with os.scandir(messages(folder)) as found:
        entries = [_entry(file.name) for file in found if not file.name.startswith(".")]
    return sorted(entries)


def _entry(name: str) -> Entry:
    stem, _, state = name.rpartition(".")
    message_id, _, size = stem.partition("-")
    if state in _NOTES and not size:
        return Entry(message_id, name, state)
    if state == TMP or (state in _STATES and size.isascii() and size.isdigit()):
        return Entry(message_id, name, state, int(size) if size.isdigit() else 0)
    return Entry(message_id, name, "")  # nobody of ours made it


def summary(folder: Path | None) -> Summary:
    """Count what is in a spool; one that is off or was never used is empty. Raises OSError."""
    if folder is None:
        return Summary()
    try:
        waiting = [e for e in scan(folder) if e.state in {STAGED, READY, HELD}]
    except FileNotFoundError:
        return Summary()
    age = 0.0
    for entry in waiting:
        with contextlib.suppress(FileNotFoundError):  # it has just been moved into the ledger
            age = max(0.0, time.time() - (messages(folder) / entry.name).stat().st_mtime)
            break
    corrupt = sum(1 for _ in (folder / "corrupt").iterdir())
    return Summary(len(waiting), sum(e.size for e in waiting), round(age, 1), corrupt)


# Owners -------------------------------------------------------------------------------------------------------


def lock_owner(folder: Path, owner: str) -> int:
    """Show that a relay process lives, until the descriptor is closed. Raises OSError when another has that name."""
    path = folder / "owners" / owner
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except (FileNotFoundError, BlockingIOError):
            # An importer looks whether we live, or tidied the file away between our open and our lock.
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.01)
        os.close(descriptor)


def is_alive(folder: Path, owner: str) -> bool:
    """Say whether the relay process of that name runs."""
    try:
        descriptor = os.open(folder / "owners" / owner, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def forget_owner(folder: Path, owner: str) -> None:
    """Remove the lock file of a process that is dead."""
    path = folder / "owners" / owner
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


# One process's side -------------------------------------------------------------------------------------------


class Spool:
    """What one relay process writes. The folders are made at the first need, so that a bad disk stops nothing else."""

    def __init__(self, folder: Path, owner: str, min_free: int = 0) -> None:
        self._folder = folder
        self._owner = owner
        self._min_free = min_free
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="spool")
        self._opening = asyncio.Lock()
        self._lock = -1
        self._messages = -1
        self._mine: dict[str, str] = {}  # id -> stem of its file; what the primary has not answered yet
        self._unsynced: list[asyncio.Future[None]] = []
        self._syncing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Make the folders and take our owner's lock. Raises OSError."""
        async with self._opening:
            if self._messages < 0:
                await self._thread(self._open)

    async def close(self) -> None:
        """Finish what is under way and give the lock back: what we leave is the importer's."""
        await self._thread(self._close)
        self._pool.shutdown()

    async def write(self, message_id: str, record: bytes) -> None:
        """Put a packed message on stable storage. Raises OSError; whatever is left then, ``discard`` removes."""
        await self.open()
        self._mine[message_id] = stem = f"{message_id}-{len(record)}"
        await self._thread(lambda: self._put(stem, STAGED, record, self._min_free))
        await self._synced()

    async def release(self, message_id: str) -> bool:
        """Mark a message as accepted, durably. False: it is not here. Raises OSError."""
        return await self._become(message_id, READY)

    async def hold(self, message_id: str) -> bool:
        """Mark a message as uncertain, durably. False: it is not here. Raises OSError."""
        return await self._become(message_id, HELD)

    async def discard(self, message_id: str) -> bool:
        """Forget a message, durably. False: it is not here. Raises OSError."""
        stem = self._mine.get(message_id)
        if stem is None or self._messages < 0:
            return False
        await self._thread(lambda: self._remove(f"{stem}.{TMP}", f"{stem}.{STAGED}"))
        await self._synced()
        self._mine.pop(message_id, None)
        return True

    async def note_release(self, released: Released) -> None:
        """Note, in case we die before Redis can be told, that a message staged in Redis was accepted. Raises OSError."""
        await self._note(released.id, RELEASE, json.dumps(released._asdict()).encode("ascii"))

    async def note_discard(self, message_id: str) -> None:
        """Note that a message staged in Redis was refused. Raises OSError."""
        await self._note(message_id, DISCARD, b"{}")

    async def strike(self, message_id: str) -> None:
        """Remove the notes about a message: Redis knows. One that comes back after a power cut does no harm."""
        if self._messages >= 0:
            await self._thread(lambda: self._remove(f"{message_id}.{RELEASE}", f"{message_id}.{DISCARD}"))

    # In the loop

    async def _thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _become(self, message_id: str, state: str) -> bool:
        stem = self._mine.get(message_id)
        if stem is None:
            return False
        await self._thread(lambda: self._rename(stem, state))
        await self._synced()
        self._mine.pop(message_id, None)
        return True

    async def _note(self, message_id: str, kind: str, text: bytes) -> None:
        await self.open()
        await self._thread(lambda: self._put(message_id, kind, text, 0))
        await self._synced()

    async def _synced(self) -> None:
        """Wait for an fsync of the folder that begins after this call; it serves all who wait."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._unsynced.append(future)
        if self._syncing is None:
            self._syncing = loop.create_task(self._sync_all())
        await future

    async def _sync_all(self) -> None:
        while self._unsynced:
            group, self._unsynced = self._unsynced, []
            error: OSError | None = None
            try:
                await self._thread(lambda: os.fsync(self._messages))
            except OSError as trouble:
                error = trouble
            for future in group:
                if future.done():
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
        self._syncing = None

    # In a thread

    def _open(self) -> None:
        prepare(self._folder)
        if self._lock < 0:
            self._lock = lock_owner(self._folder, self._owner)
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
        temporary = f"{stem}.{TMP}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._messages)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            self._remove(temporary)
            raise
        finally:
            os.close(descriptor)
        os.rename(temporary, f"{stem}.{state}", src_dir_fd=self._messages, dst_dir_fd=self._messages)

    def _rename(self, stem: str, state: str) -> None:
        before, after = f"{stem}.{STAGED}", f"{stem}.{state}"
        try:
            os.rename(before, after, src_dir_fd=self._messages, dst_dir_fd=self._messages)
        except FileNotFoundError:
            # A repetition after a failed fsync: done, and perhaps moved into the ledger since.
            return

    def _remove(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._messages)
