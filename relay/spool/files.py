"""The spool's files as the importer uses them: listing, reading, moving and deleting.

Everything here blocks on the disk and runs in threads. A disk failure raises OSError; a file that cannot be read as a
message or a note is moved unchanged to the folder ``corrupt`` and logged.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import json
import math
import os
import secrets
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from relay import maillog, metrics, private_files
from relay.ledger import changes
from relay.ledger.changes import Admitted, Released
from relay.mail import headers
from relay.mail.destination import Destination
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import is_destination_name, is_job_id, made_at, owner_of
from relay.mail.record import LockedRecord, Message
from relay.mail.stored import any_text, number, parsed, texts
from relay.spool import locks, writer
from relay.spool.skipped import Skipped, is_of_all
from relay.spool.writer import DISCARD, READY, RELEASE, STAGED, TMP, Entry

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # no hard links: files are copied instead
_LIST_EVERY = 60.0  # seconds, also when some of it could not come in
_TOLD = 100  # files of others that the log names
_LONG_AFTER = 3600.0  # seconds from the id of a message to the last change of its file's state
_AHEAD = 5000  # entries of a backlog kept in mind: it is listed again when they are done


class Due(NamedTuple):
    """The work of one pass: ids that must not stay staged in Redis, mail and notes to import, dead owners."""

    ids: list[str]
    mail: list[Entry]
    notes: list[Entry]
    dead: set[str]


class Loaded(NamedTuple):
    """The content of one file. ``came_back``: it was put there long after its message was accepted."""

    entry: Entry
    record: bytes
    released: Released
    held: bool
    came_back: bool

    def admitted_to(self, welcome: Collection[str]) -> Admitted:
        """Return it as it is imported now, for these backups only."""
        here = tuple(name for name in self.released.destinations if name in welcome)
        return Admitted(self.entry.name, self.record, self.released._replace(destinations=here))


class SpoolFiles:
    """The files of one spool, for the one process that holds its importer's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""  # identifies this folder in Redis, wherever it is mounted; known once the lock is held
        self._made: set[str] = set()  # backups whose folders exist durably
        self._locked: set[str] = set()  # names of files with a missing key, logged once
        self._ours: set[Path] = set()  # files known to belong to a trusted user
        self._foreign: set[Path] = set()  # files of other users, logged once
        self.skipped = Skipped()

    def take_over(self) -> int:
        """Take the importer's lock; returns its descriptor, -1 while another process holds it. Raises OSError."""
        writer.prepare(self._folder)
        try:
            descriptor = private_files.open_locked(self._folder / "importer.lock")
        except BlockingIOError:
            return -1
        try:
            self.name = self._identity()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _identity(self) -> str:
        path = self._folder / "identity"
        with contextlib.suppress(FileNotFoundError):
            found = private_files.read(self._folder, path.name, 200).decode("ascii", "replace").strip()
            if is_job_id(found):
                return found
            maillog.notice("error", "the spool has lost its name: it gets a new one", file=str(path))
        fresh = secrets.token_hex(8)
        private_files.write(path.parent, path.name, fresh.encode("ascii"))
        return fresh

    def definitions(self, new: dict[str, str]) -> dict[str, str]:
        """Add the current destinations to those that the spool has recorded; returns all of them. Raises OSError."""
        path = self._folder / "destinations.json"
        try:
            found: dict[str, str] = dict(parsed(private_files.read(self._folder, path.name)))
            old = {name: text for name, text in found.items() if Destination.from_json(text).name == name}
        except FileNotFoundError:
            old = {}
        except (ValueError, TypeError, private_files.Foreign) as error:
            maillog.spool_trouble(path.name, error)
            old = {}
        known = {**old, **new}
        if known != old:
            private_files.write(path.parent, path.name, json.dumps(known, indent=1).encode("utf-8"))
        return known

    def survey(self) -> Due:
        """List everything except the backlogs; set aside half-written files of dead processes and foreign files."""
        place = writer.messages(self._folder)
        names = self._of_ours(place, writer.names(place))
        self.skipped.retain({*names, *(name for b in self.backlogs() for name in writer.names(self._place(b)))})
        entries = sorted(writer.entry_of(name) for name in names)
        known = {owner_of(e.id) for e in entries if e.state} | set(writer.names(locks.folder_of(self._folder)))
        survey = Due([], [], [], {owner for owner in known if not locks.is_alive(self._folder, owner)})
        for entry in entries:
            if entry.name not in self.skipped:
                try:
                    self._judge(entry, survey)
                except OSError as error:
                    self._pass_over(entry.name, error)
        return survey

    def _judge(self, entry: Entry, survey: Due) -> None:
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

    def _of_ours(self, place: Path, names: Sequence[str]) -> list[str]:
        """Return the names of regular files of trusted users; others are left alone and logged once."""
        ours = []
        there = {place / name for name in names}
        self._ours -= {path for path in self._ours if path.parent == place and path not in there}
        for name in names:
            path = place / name
            if path not in self._ours:
                try:
                    found = path.lstat()
                except FileNotFoundError:
                    continue
                if not private_files.is_file_of_ours(found):
                    if path not in self._foreign and len(self._foreign) < _TOLD:
                        self._foreign.add(path)
                        text = "left alone in the spool: it is no file, or of another user; remove it"
                        maillog.notice("warning", text, file=str(path), owner=found.st_uid)
                    continue
                self._ours.add(path)
            ours.append(name)
        return ours

    def _pass_over(self, name: str, error: Exception) -> None:
        """Skip this file for a while. Raises ``error`` if it concerns all files."""
        if is_of_all(error):
            raise error
        self.skipped.add(name, error)

    def bury(self, dead: set[str]) -> None:
        """Remove the locks of dead processes that have no files left."""
        left = {owner_of(e.id) for e in writer.scan(self._folder) if e.state}
        for owner in dead - left:
            locks.forget(self._folder, owner)

    # One backup's backlog

    def backlogs(self) -> list[str]:
        """Return the backups that have a backlog folder."""
        return writer.backlogs(self._folder)

    def backlog(self, destination: str) -> list[Entry]:
        """Return the oldest entries of a backup's backlog; an empty folder is removed."""
        folder = writer.backlog(self._folder, destination)
        names = writer.names(folder)
        if not names:
            with contextlib.suppress(OSError):
                folder.rmdir()
        ours = self._of_ours(folder, heapq.nsmallest(_AHEAD, [name for name in names if name not in self.skipped]))
        return [entry for entry in map(writer.entry_of, ours) if entry.state]

    def put_by(self, destination: str, names: Sequence[str]) -> None:
        """Link messages into this backup's backlog, durably; their files stay where they are. May be repeated."""
        folder = writer.backlog(self._folder, destination)
        if destination not in self._made or not folder.exists():
            private_files.folder(folder)
            writer.sync(folder.parent)  # also for a folder whose creator died before the fsync
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
                private_files.write(folder, name, private_files.read(source.parent, name))
        writer.sync(folder)

    def _place(self, destination: str) -> Path:
        return writer.backlog(self._folder, destination) if destination else writer.messages(self._folder)

    # What is in the files

    def load(self, batch: Sequence[Entry], destination: str = "") -> list[Loaded]:
        """Read messages, from a backup's backlog if named; those that cannot be read are set aside."""
        loaded = []
        for entry in batch:
            if entry.name in self.skipped:
                continue
            try:
                loaded.append(self._loaded(entry, destination))
            except FileNotFoundError:
                continue
            except LockedRecord as error:  # it stays, and is imported as soon as the key is in the file
                if entry.name not in self._locked:
                    self._locked.add(entry.name)
                    maillog.notice("error", "a spooled message waits for its key", id=entry.id, reason=str(error))
            except MalformedRecord as error:
                metrics.damaged_records.labels("spool").inc()
                self._set_aside(entry.name, str(error), destination)
            except Exception as error:  # this file may be readable later; the others can be imported now
                self._pass_over(entry.name, error)
        return loaded

    def _loaded(self, entry: Entry, destination: str) -> Loaded:
        record = private_files.read(self._place(destination), entry.name, entry.size)
        message = _unpacked(entry, record)
        envelope = message.envelope
        digest = headers.equality_digest(envelope.sender, message.body)
        addresses = tuple(r.address for r in envelope.recipients)
        names = (destination,) if destination else envelope.destinations
        released = Released(envelope.id, names, digest, addresses, envelope.received_at)
        # In a backlog, a link that was made or removed changes the time, too.
        changed = (writer.messages(self._folder) / entry.name).lstat().st_ctime if not destination else 0.0
        came_back = changed > made_at(entry.id) + _LONG_AFTER
        return Loaded(entry, record, released, entry.state != READY, came_back)

    def notes(self, entries: Sequence[Entry]) -> list[tuple[Entry, Released | None]]:
        """Return notes: (entry, Released), or (entry, None) for a discard; unreadable ones are set aside."""
        found: list[tuple[Entry, Released | None]] = []
        for entry in entries:
            if entry.state == DISCARD:
                found.append((entry, None))
                continue
            try:
                found.append((entry, self._read_note(entry)))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self._set_aside(entry.name, f"unreadable note: {error}")
            except Exception as error:
                self._pass_over(entry.name, error)
        return found

    def _read_note(self, entry: Entry) -> Released:
        note = parsed(private_files.read(writer.messages(self._folder), entry.name))
        names = texts(note["destinations"])
        if note["id"] != entry.id or not all(map(is_destination_name, names)):
            raise ValueError("of another message, or for no backup")
        at = number(note.get("accepted_at", 0))
        return Released(entry.id, names, any_text(note["digest"]), texts(note["recipients"]), at)

    def gone(self, members: Sequence[str]) -> list[str]:
        """Return those of these notes (see ``changes.note_of``) whose files are durably deleted."""
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
        """Set aside a file whose process was killed while writing it: its client got no 2xx."""
        if self._move(name, "unfinished", ""):
            maillog.spool_unfinished(name)

    def _set_aside(self, name: str, reason: str, destination: str = "") -> None:
        try:
            if moved := self._move(name, "corrupt", destination):
                maillog.spool_set_aside(moved, reason)
        except OSError as error:
            self._pass_over(name, error)

    def _move(self, name: str, folder: str, destination: str) -> str:
        """Move a file into this folder; returns its name there, "" if it is gone."""
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
        """Delete files that are in the ledger now or in another folder."""
        for name in names:
            try:
                (self._place(destination) / name).unlink(missing_ok=True)
            except OSError as error:  # its note stays in Redis as long as the file, so it is not imported again
                self._pass_over(name, error)


class Ahead:
    """The next entries of each backlog, so that a long one is not listed for each small batch."""

    def __init__(self, shelf: SpoolFiles) -> None:
        self._shelf = shelf
        self._listed: dict[str, tuple[float, dict[str, Entry]]] = {}

    def of(self, destination: str) -> list[Entry]:
        """Return the oldest entries of this backup's backlog that have not been processed yet."""
        at, entries = self._listed.get(destination, (-math.inf, {}))
        now = time.monotonic()
        if not entries or now - at > _LIST_EVERY:
            entries = {entry.name: entry for entry in self._shelf.backlog(destination)}
            self._listed[destination] = (now, entries)
        return list(entries.values())

    def had_their_turn(self, destination: str, entries: Sequence[Entry]) -> None:
        """Remove processed entries, until the folder is listed again."""
        _, listed = self._listed.get(destination, (0.0, {}))
        for entry in entries:
            listed.pop(entry.name, None)


def _unpacked(entry: Entry, record: bytes) -> Message:
    if len(record) != entry.size:
        raise MalformedRecord(f"damaged: it has {len(record)} octets, its name says {entry.size}")
    return Message.unpack(record, entry.id)
