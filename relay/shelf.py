"""The importer's view of the spool's files: what there is, what is in it, and where to put what cannot be read.

All of it waits for the disk and runs in threads. Trouble with the disk is an OSError; a file that makes no sense
is moved to the folder ``corrupt``, as it is, and logged.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from relay import headers, maillog, owners, spool
from relay.envelope import MalformedRecord, Message, owner_of
from relay.ledger import Released
from relay.spool import DISCARD, READY, RELEASE, STAGED, TMP, Entry


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


class Shelf:
    """The files of one spool, for the one process that holds its importer's lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.name = ""  # under which Redis knows this folder, wherever it is mounted; known once it is ours

    def take_over(self) -> int:
        """Return the lock's descriptor, -1 while another process has it."""
        spool.prepare(self._folder)
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
        """Look at everything; half-written files of the dead, and what is no file of ours, are set aside."""
        entries = spool.scan(self._folder)
        known = {owner_of(e.id) for e in entries} | {p.name for p in owners.folder_of(self._folder).iterdir()}
        survey = Survey([], [], [], {owner for owner in known if not owners.is_alive(self._folder, owner)})
        for entry in entries:
            abandoned = owner_of(entry.id) in survey.dead
            if not entry.state:
                self._set_aside(entry.name, "no file of ours")
            elif entry.state == TMP:
                if abandoned:
                    self._set_aside(entry.name, "half written when its relay process died")
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
        left = {owner_of(e.id) for e in spool.scan(self._folder)}
        for owner in dead - left:
            owners.forget(self._folder, owner)

    def load(self, batch: Sequence[Entry]) -> list[Loaded]:
        loaded = []
        for entry in batch:
            try:
                record = (spool.messages(self._folder) / entry.name).read_bytes()
                message = Message.unpack(record)
                if message.envelope.id != entry.id:
                    raise MalformedRecord(f"the record of {message.envelope.id}")  # noqa: TRY301
            except FileNotFoundError:
                continue
            except MalformedRecord as error:
                self._set_aside(entry.name, str(error))
                continue
            except OSError as error:  # this one may be readable later; the others are now
                maillog.spool_trouble(entry.name, error)
                continue
            envelope = message.envelope
            digest = headers.equality_digest(envelope.sender, message.body)
            addresses = tuple(r.address for r in envelope.recipients)
            released = Released(envelope.id, envelope.destinations, digest, addresses)
            loaded.append(Loaded(entry, record, released, held=entry.state != READY))
        return loaded

    def notes(self, entries: Sequence[Entry]) -> list[Released]:
        notes = (self._read_note(e) for e in entries if e.state == RELEASE)
        return [note for note in notes if note is not None]

    def _read_note(self, entry: Entry) -> Released | None:
        try:
            note = json.loads((spool.messages(self._folder) / entry.name).read_bytes())
            return Released(note["id"], tuple(note["destinations"]), note["digest"], tuple(note["recipients"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            self._set_aside(entry.name, f"unreadable note: {error}")
            return None

    def gone(self, ids: Sequence[str]) -> list[str]:
        """Return those of these ids whose files are gone for good."""
        left = {e.id for e in spool.scan(self._folder)}
        spool.sync(spool.messages(self._folder))
        return [i for i in ids if i not in left]

    def _set_aside(self, name: str, reason: str) -> None:
        target = self._folder / "corrupt" / name
        if target.exists():
            target = target.with_name(f"{name}.{secrets.token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):
            (spool.messages(self._folder) / name).rename(target)
            for folder in (target.parent, spool.messages(self._folder)):
                spool.sync(folder)
            maillog.spool_set_aside(target.name, reason)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            (spool.messages(self._folder) / name).unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    spool.sync(path.parent)
