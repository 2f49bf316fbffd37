"""The importer's view of the spool's files: what there is, what is in it, and where to put what cannot be read.

All of it waits for the disk and runs in threads. Trouble with the disk is an OSError; a file that makes no sense
is moved to the folder ``corrupt``, as it is, and logged.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import json
import math
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from relay import maillog, metrics
from relay.ledger import changes
from relay.ledger.changes import Released
from relay.mail import headers
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import owner_of
from relay.mail.record import LockedRecord, Message
from relay.spool import locks, writer
from relay.spool.writer import DISCARD, READY, RELEASE, STAGED, TMP, Entry

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # the disk has none: copies, then
_LIST_EVERY = 60.0  # seconds, also when some of it could not come in
_AHEAD = 5000  # entries of a backlog kept in mind: it is listed again when they are done


class Survey(NamedTuple):
    """What one pass finds to do: ids that Redis must not have staged, mail and notes to bring in, dead owners."""

    ids: list[str]
    mail: list[Entry]
    notes: list[Entry]
    dead: set[str]


class Loaded(NamedTuple):
    """One file, read."""

    entry: Entry
    record: bytes
    released: Released
    held: bool


class SpoolFiles:
    """The files of one spool, for the one process that holds its importer's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""  # under which Redis knows this folder, wherever it is mounted; known once it is ours
        self._made: set[str] = set()  # backups whose folders are there for good
        self._locked: set[str] = set()  # names of files whose key is not here, told once

    def take_over(self) -> int:
        """Return the lock's descriptor, -1 while another process has it."""
        writer.prepare(self._folder)
        descriptor = os.open(self._folder / "importer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.name = self._identity()
        except BlockingIOError:
            os.close(descriptor)
            return -1
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _identity(self) -> str:
        path = self._folder / "identity"
        if not path.exists():
            _write(path, secrets.token_hex(8).encode("ascii"))
        return path.read_text("ascii").strip()

    def definitions(self, new: dict[str, str]) -> dict[str, str]:
        """Return the destinations that this spool has ever known, the present ones among them, and keep them."""
        path = self._folder / "destinations.json"
        try:
            old: dict[str, str] = dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            old = {}
        except (ValueError, TypeError) as error:
            maillog.spool_trouble(path.name, error)
            old = {}
        known = {**old, **new}
        if known != old:
            _write(path, json.dumps(known, indent=1).encode("utf-8"))
        return known

    def survey(self) -> Survey:
        """Look at all but the backlogs; half-written files of the dead, and what is no file of ours, are set aside."""
        entries = writer.scan(self._folder)
        known = {owner_of(e.id) for e in entries} | {p.name for p in locks.folder_of(self._folder).iterdir()}
        survey = Survey([], [], [], {owner for owner in known if not locks.is_alive(self._folder, owner)})
        for entry in entries:
            abandoned = owner_of(entry.id) in survey.dead
            if not entry.state:
                self._set_aside(entry.name, "no file of ours")
            elif entry.state == TMP:
                if abandoned:
                    self._tidy(entry.name)
            elif entry.state in {RELEASE, DISCARD}:
                if abandoned:
                    survey.notes.append(entry)
            else:
                survey.ids.append(entry.id)
                if abandoned or entry.state != STAGED:
                    survey.mail.append(entry)
        return survey

    def bury(self, dead: set[str]) -> None:
        """Forget the dead who have left nothing more."""
        left = {owner_of(e.id) for e in writer.scan(self._folder)}
        for owner in dead - left:
            locks.forget(self._folder, owner)

    # One backup's backlog

    def backlogs(self) -> list[str]:
        """Return the backups for which something may wait."""
        return writer.backlogs(self._folder)

    def backlog(self, destination: str) -> list[Entry]:
        """Return the oldest of what waits for a backup alone; an empty folder goes."""
        folder = writer.backlog(self._folder, destination)
        names = writer.names(folder)
        if not names:
            with contextlib.suppress(OSError):
                folder.rmdir()
        return [writer.entry_of(name) for name in heapq.nsmallest(_AHEAD, names)]

    def put_by(self, destination: str, names: Sequence[str]) -> None:
        """Have messages wait for this backup as well as where they are; durable at the end, and may be repeated."""
        folder = writer.backlog(self._folder, destination)
        if destination not in self._made or not folder.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            writer.sync(folder.parent)  # also where a predecessor made it, and died before this
            self._made.add(destination)
        for name in names:
            source = writer.messages(self._folder) / name
            try:
                os.link(source, folder / name)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                _write(folder / name, source.read_bytes())
        writer.sync(folder)

    def _place(self, destination: str) -> Path:
        return writer.backlog(self._folder, destination) if destination else writer.messages(self._folder)

    # What is in the files

    def load(self, batch: Sequence[Entry], destination: str = "") -> list[Loaded]:
        """Read messages, of a backup's backlog where one is named; what makes no sense is set aside."""
        loaded = []
        for entry in batch:
            try:
                record = (self._place(destination) / entry.name).read_bytes()
                message = _unpacked(entry, record)
            except FileNotFoundError:
                continue
            except LockedRecord as error:  # it stays, and comes in as soon as the key is here
                if entry.name not in self._locked:
                    self._locked.add(entry.name)
                    maillog.notice("error", "a spooled message waits for its key", id=entry.id, reason=str(error))
                continue
            except MalformedRecord as error:
                metrics.damaged_records.labels("spool").inc()
                self._set_aside(entry.name, str(error), destination)
                continue
            except OSError as error:  # this one may be readable later; the others are now
                maillog.spool_trouble(entry.name, error)
                continue
            envelope = message.envelope
            digest = headers.equality_digest(envelope.sender, message.body)
            addresses = tuple(r.address for r in envelope.recipients)
            names = (destination,) if destination else envelope.destinations
            released = Released(envelope.id, names, digest, addresses, envelope.received_at)
            loaded.append(Loaded(entry, record, released, held=entry.state != READY))
        return loaded

    def notes(self, entries: Sequence[Entry]) -> list[Released]:
        notes = (self._read_note(e) for e in entries if e.state == RELEASE)
        return [note for note in notes if note is not None]

    def _read_note(self, entry: Entry) -> Released | None:
        try:
            note = json.loads((writer.messages(self._folder) / entry.name).read_bytes())
            return Released(
                note["id"],
                tuple(note["destinations"]),
                note["digest"],
                tuple(note["recipients"]),
                float(note.get("accepted_at", 0)),
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            self._set_aside(entry.name, f"unreadable note: {error}")
            return None

    def gone(self, members: Sequence[str]) -> list[str]:
        """Return those of these notes (see ``ledger.note_of``) whose files are gone for good."""
        left = writer.scan(self._folder)
        known = {e.id for e in left} | {e.name for e in left}
        notes = {member: changes.note_of(member) for member in members}
        over = [m for m, (file, name) in notes.items() if file not in known and not self._is_put_by(file, name)]
        for place in {writer.messages(self._folder), *(self._place(notes[member][1]) for member in over)}:
            with contextlib.suppress(FileNotFoundError):
                writer.sync(place)
        return over

    def _is_put_by(self, file: str, destination: str) -> bool:
        return bool(destination) and (writer.backlog(self._folder, destination) / file).exists()

    def _tidy(self, name: str) -> None:
        """Put away what was being written when its process was killed: the client has not heard 2xx for it."""
        if self._move(name, "unfinished", ""):
            maillog.spool_unfinished(name)

    def _set_aside(self, name: str, reason: str, destination: str = "") -> None:
        if moved := self._move(name, "corrupt", destination):
            maillog.spool_set_aside(moved, reason)

    def _move(self, name: str, folder: str, destination: str) -> str:
        """Move a file into this folder. Returns its name there, "" where it is gone."""
        source = self._place(destination)
        target = self._folder / folder / name
        if target.exists():
            target = target.with_name(f"{name}.{secrets.token_hex(4)}")
        try:
            (source / name).rename(target)
        except FileNotFoundError:
            return ""
        for changed in (target.parent, source):
            writer.sync(changed)
        return target.name

    def delete(self, names: Sequence[str], destination: str = "") -> None:
        """Forget files that are in the ledger now, or where another folder has them."""
        for name in names:
            (self._place(destination) / name).unlink(missing_ok=True)


class Ahead:
    """What comes next of each backlog. A long one is not listed for every handful that comes in."""

    def __init__(self, shelf: SpoolFiles) -> None:
        self._shelf = shelf
        self._listed: dict[str, tuple[float, dict[str, Entry]]] = {}

    def of(self, destination: str) -> list[Entry]:
        """Return the oldest of what waits for this backup alone."""
        at, entries = self._listed.get(destination, (-math.inf, {}))
        now = time.monotonic()
        if not entries or now - at > _LIST_EVERY:
            entries = {entry.name: entry for entry in self._shelf.backlog(destination)}
            self._listed[destination] = (now, entries)
        return list(entries.values())

    def had_their_turn(self, destination: str, entries: Sequence[Entry]) -> None:
        """Do not name these again, until the folder is listed anew."""
        _, listed = self._listed.get(destination, (0.0, {}))
        for entry in entries:
            listed.pop(entry.name, None)


def _unpacked(entry: Entry, record: bytes) -> Message:
    if len(record) != entry.size:
        raise MalformedRecord(f"damaged: it has {len(record)} octets, its name says {entry.size}")
    return Message.unpack(record, entry.id)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    writer.sync(path.parent)
