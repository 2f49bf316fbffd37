"""The collector: a task of housekeeping that takes all processes' events and writes them to the files of the hour.

It takes what is there, puts together what belongs to one message, and writes once a second. What cannot be written (a
full disk, a folder that is read-only) is dropped, counted, and told once a minute; nobody waits for it. A damaged file
is set aside and another one begun. When the files exceed ``trace.max_bytes`` or are older than ``trace.keep``, the
oldest goes as a whole. Less free disk than the spool needs is a full disk: mail has priority.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loguru import logger

from relay import metrics, private_files
from relay.config.model import TraceSettings
from relay.mail import encryption
from relay.repeated import Repeated
from relay.stopping import StopEvent
from relay.trace import events, files, privacy, search_terms
from relay.trace.files import HourFile, OpenFile, Row
from relay.trace.privacy import Privacy

_EVERY = 1.0  # seconds between two writes
_MANY = 4000  # events that are written before that
_WAIT = 0.5  # seconds for the next datagram
_ID_LENGTH = 16
_LARGEST = 1 << 20  # octets of a datagram
_SWEEP = 30.0  # seconds between two looks at what there is
_PARTS = 8  # a file takes at most this part of trace.max_bytes
_SMALLEST = 1 << 20  # octets of a file before another is begun
_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode

# Beside what a disk and a file may do: an event that nobody of this version has sent. Housekeeping goes on.
_EXPECTED = (
    OSError, sqlite3.Error, files.DamagedFile, files.ClosedFile, encryption.MissingKey,
    ValueError, TypeError, LookupError,
)  # fmt: skip
Clock = Callable[[], float]
Told = tuple[list[str], set[str]]  # the texts of events, and their words
_decode = json.JSONDecoder().raw_decode


class Collector:
    """Writes the trace of one installation, as the role that it runs in."""

    def __init__(
        self,
        settings: TraceSettings,
        state_dir: Path,
        role: str,
        reading: socket.socket,
        *,
        min_free: int,
        clock: Clock = time.time,
    ) -> None:
        self._settings = settings
        self._folder = files.folder_of(state_dir)
        self._role = role
        self._reading = reading
        self._min_free = min_free
        self._clock = clock
        self._privacy: Privacy | None = None
        self._open: OpenFile | None = None
        self._number = 0  # of the file that is written in its hour
        self._pending: dict[str, Told] = {}
        self._count = 0  # of pending events
        self._begun = 0.0  # monotonic: since when some are pending
        self._swept = float("-inf")
        self._trouble = Repeated("trace", logger.warning, logger.info)

    def run(self, stop: StopEvent) -> None:
        """Collect until the event is set, and what is there by then."""
        with stop.readable() as stopped:
            self._run(stop, stopped)

    def _run(self, stop: StopEvent, stopped: socket.socket) -> None:
        try:
            while not stop.is_set():
                wait = _WAIT if not self._count else max(0.0, min(_WAIT, self._begun + _EVERY - time.monotonic()))
                select.select([self._reading, stopped], [], [], wait)
                self.collect()
                if self._count and (self._count >= _MANY or time.monotonic() >= self._begun + _EVERY):
                    self.write()
                if time.monotonic() >= self._swept + _SWEEP:
                    self.sweep()
            self.collect()
            if self._count:
                self.write()
        finally:
            self._close()

    def collect(self) -> None:
        """Take what has come, up to what is worth a write."""
        while self._count < _MANY:
            try:
                data = self._reading.recv(_LARGEST)
            except (BlockingIOError, InterruptedError):
                return
            if not self._count:
                self._begun = time.monotonic()
            self._count += take_apart(data, self._pending)

    def write(self) -> None:
        """Write what is pending; what cannot be written is dropped."""
        pending, count = self._pending, self._count
        self._pending, self._count = {}, 0
        try:
            self._make_room()
            rows = _rows(pending, self._kept_by())
            try:
                self._file().add(rows)
            except (sqlite3.Error, files.DamagedFile) as error:
                if not files.is_damage(error):
                    raise
                self._set_aside(error)
                self._file().add(rows)
        except _EXPECTED as error:
            self._close()
            metrics.trace_dropped.inc(count)
            self._trouble.came(f"{_words(error)}; mail goes on, its trace is not kept")
        else:
            self._trouble.is_over()

    def _make_room(self) -> None:
        """See that the folder is there and that the disk has room. Raises OSError."""
        private_files.folder(self._folder)
        if self._min_free:
            found = os.statvfs(self._folder)
            if found.f_bavail * found.f_frsize < self._min_free:
                raise OSError(f"less than {self._min_free >> 20} MiB are free on the disk, which the spool may need")

    def _kept_by(self) -> Privacy:
        if self._privacy is None:
            mode = self._settings.addresses
            key = privacy.key_of(self._folder, make=True) if mode == privacy.HASHED else None
            self._privacy = Privacy(mode, key)
        return self._privacy

    # --- files ------------------------------------------------------------------------------------------------

    def _file(self) -> OpenFile:
        """Return the file for what is written now. Raises what opening it raises."""
        now = self._clock()
        hour = int(now) // files.HOUR * files.HOUR
        opened = self._open
        if opened is not None:
            if opened.file.hour == hour and not self._is_full(opened) and opened.file.path.exists():
                return opened
            self._open = None
            opened.finish()
            self._swept = float("-inf")
        return self._opened(now)

    def _is_full(self, opened: OpenFile) -> bool:
        most = max(self._settings.max_bytes // _PARTS, _SMALLEST)
        return opened.file.octets > most or opened.is_sealed != encryption.is_on()

    def _opened(self, now: float) -> OpenFile:
        there = [
            f.number for f in files.listed(self._folder) if f.role == self._role and f.hour == int(now) // 3600 * 3600
        ]
        number = max(there, default=1)
        while True:
            file = files.named(self._folder, now, self._role, number)
            try:
                opened = files.open_to_write(file)
            except files.ClosedFile:
                number += 1  # of a later version, or its key is gone: it stays as it is
                continue
            except (sqlite3.Error, files.DamagedFile) as error:
                if not files.is_damage(error):
                    raise
                self._told_aside(file, error)
                continue
            if self._is_full(opened):
                opened.finish()
                number += 1
                continue
            self._open = opened
            return opened

    def _set_aside(self, error: Exception) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()
            self._told_aside(opened.file, error)

    @staticmethod
    def _told_aside(file: HourFile, error: Exception) -> None:
        """Set a damaged file aside, and say so. Raises OSError."""
        logger.bind(file=file.path.name, reason=str(error), kept=str(file.set_aside())).error("trace file set aside")

    def _close(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.finish()

    # --- what there is ----------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Delete what is too old or too much, whole files, and finish those that a killed collector has left."""
        self._swept = time.monotonic()
        current = self._open.file.path if self._open else None
        try:
            found = [(file, file.octets) for file in files.listed(self._folder)]
            total, now = sum(octets for _, octets in found), self._clock()
            for file, octets in found:
                is_over = total > self._settings.max_bytes or now - file.hour - files.HOUR > self._settings.keep
                if is_over and file.path != current:
                    file.remove()
                    total -= octets
                elif file.role == self._role and file.path != current and len(file.all_paths) > 1:
                    self._finish(file)
        except OSError as error:
            self._trouble.came(_words(error))

    @staticmethod
    def _finish(file: HourFile) -> None:
        if any(path.exists() for path in file.all_paths[1:]):
            with suppress(OSError, sqlite3.Error, files.ClosedFile, files.DamagedFile):
                files.open_to_write(file).finish()


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def take_apart(data: bytes, pending: dict[str, Told]) -> int:
    """Add the events of a datagram to those of their messages; returns how many there were.

    What makes no sense is dropped, and counted. The text of each event is kept as it came.
    """
    count = 0
    try:
        text = data.decode("ascii")
        at, last = 1, len(text) - 1
        while at < last:
            event, end = _decode(text, at)
            message_id = event[1]
            if type(message_id) is not str or len(message_id) != _ID_LENGTH:
                break
            told = pending.setdefault(message_id, ([], set()))
            told[1].update(search_terms.of(event))
            told[0].append(text[at:end])
            count += 1
            at = end + 1
        else:
            return count
        metrics.trace_dropped.inc()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        metrics.trace_dropped.inc()
    return count


def _rows(pending: dict[str, Told], kept: Privacy) -> list[Row]:
    if kept.mode == privacy.CLEAR:
        return [
            (f"[{','.join(texts)}]".encode("ascii"), [search_terms.ID + message_id, *found])
            for message_id, (texts, found) in pending.items()
        ]
    rows: list[Row] = []
    for message_id, (texts, _) in pending.items():
        told = [events.stored(kept.keep(event)) for text in texts if (event := events.read(json.loads(text)))]
        found = {search_terms.ID + message_id, *(word for one in told for word in search_terms.of(one))}
        rows.append((_to_json(told).encode("ascii"), list(found)))
    return rows
