"""The importer's view of the spool's files: what there is, what is in it, and where to put what cannot be read.

All of it waits for the disk and runs in threads. Trouble with the disk is an OSError; a file that makes no sense
is moved to the folder ``corrupt``, as it is, and logged.
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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from relay import maillog, metrics, private_files
from relay.ledger import changes
from relay.ledger.changes import Released
from relay.mail import headers
from relay.mail.destination import Destination
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import is_destination_name, is_job_id, owner_of
from relay.mail.record import LockedRecord, Message
from relay.mail.stored import any_text, number, texts
from relay.spool import locks, writer
from relay.spool.skipped import Skipped, is_of_all
from relay.spool.writer import DISCARD, READY, RELEASE, STAGED, TMP, Entry

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # the disk has none: copies, then
_LIST_EVERY = 60.0  # seconds, also when some of it could not come in
_TOLD = 100  # files of others that the log names
_AHEAD = 5000  # entries of a backlog kept in mind: it is listed again when they are done


class Due(NamedTuple):
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
        self._ours: set[Path] = set()  # files that were seen to be ours
        self._foreign: set[Path] = set()  # those that are not, told once
        self.skipped = Skipped()

    def take_over(self) -> int:
        """Return the lock's descriptor, -1 while another process has it."""
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
        """Return the destinations that this spool has ever known, the present ones among them, and keep them."""
        path = self._folder / "destinations.json"
        try:
            found: dict[str, str] = dict(json.loads(private_files.read(self._folder, path.name)))
            old = {name: text for name, text in found.items() if Destination.from_json(text).name == name}
        except FileNotFoundError:
            old = {}
        except (ValueError, TypeError, RecursionError, private_files.Foreign) as error:
            maillog.spool_trouble(path.name, error)
            old = {}
        known = {**old, **new}
        if known != old:
            private_files.write(path.parent, path.name, json.dumps(known, indent=1).encode("utf-8"))
        return known

    def survey(self) -> Due:
        """Look at all but the backlogs; half-written files of the dead, and what is no file of ours, are set aside."""
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
        """Return those that are regular files of ours; what another user put there is left alone, and told once."""
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
        """Go on without this file for a while. Raises the trouble that all files have."""
        if is_of_all(error):
            raise error
        self.skipped.add(name, error)

    def bury(self, dead: set[str]) -> None:
        """Forget the dead who have left nothing more."""
        left = {owner_of(e.id) for e in writer.scan(self._folder) if e.state}
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
        ours = self._of_ours(folder, heapq.nsmallest(_AHEAD, [name for name in names if name not in self.skipped]))
        return [entry for entry in map(writer.entry_of, ours) if entry.state]

    def put_by(self, destination: str, names: Sequence[str]) -> None:
        """Have messages wait for this backup as well as where they are; durable at the end, and may be repeated."""
        folder = writer.backlog(self._folder, destination)
        if destination not in self._made or not folder.exists():
            private_files.folder(folder)
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
                private_files.write(folder, name, private_files.read(source.parent, name))
        writer.sync(folder)

    def _place(self, destination: str) -> Path:
        return writer.backlog(self._folder, destination) if destination else writer.messages(self._folder)

    # What is in the files

    def load(self, batch: Sequence[Entry], destination: str = "") -> list[Loaded]:
        """Read messages, of a backup's backlog where one is named; what makes no sense is set aside."""
        loaded = []
        for entry in batch:
            if entry.name in self.skipped:
                continue
            try:
                loaded.append(self._loaded(entry, destination))
            except FileNotFoundError:
                continue
            except LockedRecord as error:  # it stays, and comes in as soon as the key is here
                if entry.name not in self._locked:
                    self._locked.add(entry.name)
                    maillog.notice("error", "a spooled message waits for its key", id=entry.id, reason=str(error))
            except MalformedRecord as error:
                metrics.damaged_records.labels("spool").inc()
                try:
                    self._set_aside(entry.name, str(error), destination)
                except OSError as trouble:
                    self._pass_over(entry.name, trouble)
            except Exception as error:  # this one may be readable later; the others are now
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
        return Loaded(entry, record, released, held=entry.state != READY)

    def notes(self, entries: Sequence[Entry]) -> list[tuple[Entry, Released | None]]:
        """Read notes of releases, and name those of discards; what makes no sense is set aside."""
        found: list[tuple[Entry, Released | None]] = []
        for entry in entries:
            if entry.state == DISCARD:
                found.append((entry, None))
                continue
            try:
                found.append((entry, self._read_note(entry)))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                try:
                    self._set_aside(entry.name, f"unreadable note: {error}")
                except OSError as trouble:
                    self._pass_over(entry.name, trouble)
            except Exception as error:
                self._pass_over(entry.name, error)
        return found

    def _read_note(self, entry: Entry) -> Released:
        note = json.loads(private_files.read(writer.messages(self._folder), entry.name))
        names = texts(note["destinations"])
        if note["id"] != entry.id or not all(map(is_destination_name, names)):
            raise ValueError("of another message, or for no backup")
        at = number(note.get("accepted_at", 0))
        return Released(entry.id, names, any_text(note["digest"]), texts(note["recipients"]), at)

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
            try:
                (self._place(destination) / name).unlink(missing_ok=True)
            except OSError as error:  # its note in Redis stays as long as it does: it comes in once
                self._pass_over(name, error)


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
