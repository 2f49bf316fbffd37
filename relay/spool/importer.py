"""The importer: moves spooled messages into the ledger, oldest first and with the same id, when Redis is back.

One process per spool does this, under a lock that the kernel releases when it ends. It touches only files that no
living process will change: released and held messages, and those that dead processes left; a staged message of a dead
process becomes uncertain. New mail has priority: after each batch the importer rests three times as long as the batch
took, and it stops while stages fail. While Redis is nearly full (see admission.py), a message is imported for the
backups that may get more, and linked into the backlog folders of the others before its file is deleted.
Every step may be interrupted and repeated: the script that imports a share also notes it, and the note stays until the
file is durably deleted. A file that cannot be read is set aside in the spool's folder ``corrupt``, never deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import DataError, OutOfMemoryError, RedisError, ResponseError

from relay import maillog, metrics
from relay.batches import batched
from relay.ledger import changes, keys
from relay.ledger.changes import Admitted, Held, Released
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.destination import Destination
from relay.mail.ids import is_destination_name, is_id, text
from relay.spool import writer
from relay.spool.admission import Admission
from relay.spool.files import Ahead, Loaded, SpoolFiles
from relay.spool.skipped import is_of_all
from relay.spool.writer import STAGED, Entry

_LOOK_SECONDS = 1.0
_SHORT_SECONDS = 0.1  # while memory is short: the few imported copies may be delivered by then
_BATCH = 100
_BATCH_BYTES = 1 << 20  # blocks Redis for no longer than a group of new mail does
_BATCH_PART = 0.02  # of maxmemory: a batch must fit into the rest when Redis is nearly full
_SLICE_SECONDS = 2.0  # for one backup's backlog, then the others have a turn
_PAGE = 1000
_SHARE = 3  # seconds of rest for each second of work
_FORGET_AFTER = 60.0  # seconds; a command under way has reached Redis by then or never will
_TRIES = 3
_TROUBLE_SECONDS = 10.0  # until the next try after a disk failure


class Importer:
    """The import task of one relay process."""

    def __init__(
        self,
        folder: Path,
        connection: Redis,
        dispatcher: Dispatcher,
        watch: Monitor,
        *,
        destinations: Sequence[Destination],
        hold_seconds: float,
    ) -> None:
        self._shelf = SpoolFiles(folder)
        self._ahead = Ahead(self._shelf)
        self._connection = connection
        self._dispatcher = dispatcher
        self._watch = watch
        self._destinations = destinations
        self._hold_seconds = hold_seconds
        self._room = Admission(connection, watch)
        self._known: set[str] | None = None  # backups that this spool may have copies for
        self._stopping = asyncio.Event()
        self._next_forgetting = 0.0  # monotonic; an idle importer asks Redis for nothing else
        self._is_short = False  # files were left for lack of memory in Redis
        self._told: set[str] = set()  # names of files that do not fit, logged once
        self._tries: Counter[str] = Counter()  # of batches that Redis refused, by their first file
        self.passes = 0  # complete passes over the spool
        self.waits = 0  # for Redis to answer, or for room

    async def run(self) -> None:
        """Wait for the lock, then import until ``stop``."""
        lock = -1
        try:
            while not self._stopping.is_set():
                try:
                    if lock < 0:
                        lock = await asyncio.to_thread(self._shelf.take_over)
                    self._is_short = False
                    if lock >= 0 and self._watch.is_calm:
                        if await self._once():
                            continue
                    else:
                        self.waits += 1
                except OSError as error:
                    maillog.spool_trouble("import", error)
                    await self._rest(_TROUBLE_SECONDS)
                except RedisError as error:
                    self._watch.failed(error)
                except Exception as error:  # the border: no fault must end the import
                    maillog.spool_trouble("import", error)
                    await self._rest(_TROUBLE_SECONDS)
                await self._rest(_SHORT_SECONDS if self._is_short else _LOOK_SECONDS)
        finally:
            if lock >= 0:
                os.close(lock)

    def stop(self) -> None:
        """Stop after the current batch."""
        self._stopping.set()

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    # One pass ---------------------------------------------------------------------------------------------------

    async def _once(self) -> bool:
        """Import once everything that there is room for; returns whether more can be imported now."""
        found = await asyncio.to_thread(self._shelf.survey)
        await self._introduce()
        # First of all: a stage that timed out may be in Redis too, and must not become uncertain there.
        for page in batched(found.ids, _PAGE):
            await self._execute(partial(changes.unstage, spool=self._shelf.name, ids=page))
        await self._settle_notes(found.notes)
        await self._import(found.mail)
        more = await self._import_backlogs()
        await self._forget()
        if found.dead:
            await asyncio.to_thread(self._shelf.bury, found.dead)
        self.passes += 1
        return more

    async def _introduce(self) -> None:
        """Register the recorded destinations of spooled copies: their relay may never have reached Redis."""
        if self._known is not None:
            return
        definitions = {d.name: d.to_json() for d in self._destinations}
        known = await asyncio.to_thread(self._shelf.definitions, definitions)
        async with self._connection.pipeline(transaction=True) as pipe:
            for name, text in known.items():
                pipe.hsetnx(keys.DESTINATIONS, name, text)
            await pipe.execute()
        self._known = set(known)

    async def _settle_notes(self, notes: Sequence[Entry]) -> None:
        """Apply the noted releases and discards of dead processes."""
        for page in batched(notes, _PAGE):
            found = await asyncio.to_thread(self._shelf.notes, page)
            try:
                await self._settle_page(found)
            except (ResponseError, DataError) as error:
                if isinstance(error, OutOfMemoryError):
                    raise
                for note in found:  # a note that Redis refuses must not stop the others
                    try:
                        await self._settle_page([note])
                    except (ResponseError, DataError) as trouble:
                        self._shelf.skipped.add(note[0].name, trouble)

    async def _settle_page(self, found: Sequence[tuple[Entry, Released | None]]) -> None:
        accepted = [note for _, note in found if note is not None]
        refused = [entry.id for entry, note in found if note is None]
        if accepted:
            await self._execute(partial(changes.release, messages=accepted))
        if refused:
            await self._execute(partial(changes.discard, ids=refused))
        await self._dispatch(accepted)
        await asyncio.to_thread(self._shelf.delete, [entry.name for entry, _ in found])

    async def _import(self, entries: Sequence[Entry], backup: str = "", seconds: float = math.inf) -> bool:
        """Import messages, from a backup's backlog if named; returns whether ``seconds`` were too short."""
        deadline = time.monotonic() + seconds
        for batch in _batches(entries, self._watch.part(_BATCH_PART, _BATCH_BYTES)):
            while not await self._try(batch, backup):
                if backup or self._stopping.is_set():
                    return False
                self.waits += 1
                await self._rest(_SHORT_SECONDS if self._watch.is_calm else _LOOK_SECONDS)
            if self._stopping.is_set():
                break
            if time.monotonic() > deadline:
                return True
        return False

    async def _try(self, batch: Sequence[Entry], backup: str) -> bool:
        """Import those of a batch that fit; returns False if it must be tried again later."""
        started = time.monotonic()
        try:
            mean = sum(entry.size for entry in batch) // len(batch)
            levels = await self._room.levels({backup} if backup else self._known or (), mean)
            fitting = self._fitting(batch, max(levels.values(), default=0.0))
            if not levels or (backup and not fitting):
                return False
            await self._bring_in(fitting, levels, backup)
            self._ahead.had_their_turn(backup, fitting)
        except RedisError as error:
            self._watch.failed(error)
            # Redis answered between the tries, so it is this record that it refuses; the others must go on.
            self._tries[batch[0].name] += not isinstance(error, OutOfMemoryError)
            if self._tries[batch[0].name] < _TRIES:
                return False
            await self._skip(batch, backup, error)
        except Exception as error:
            if is_of_all(error):
                raise
            await self._skip(batch, backup, error)
        else:
            # New mail has priority; but while memory is short, new mail goes to the spool.
            share = _SHARE if self._watch.may_import() else 1
            await self._rest(share * (time.monotonic() - started))
        self._tries.pop(batch[0].name, None)
        return True

    async def _import_backlogs(self) -> bool:
        """Import from each backup's backlog for ``_SLICE_SECONDS``; returns whether one has more to import now."""
        more = False
        for name in await asyncio.to_thread(self._shelf.backlogs):
            if await self._room.levels({name}, 1):
                entries = await asyncio.to_thread(self._ahead.of, name)
                more |= await self._import(entries, name, _SLICE_SECONDS)
        return more

    async def _skip(self, batch: Sequence[Entry], backup: str, error: Exception) -> None:
        """Import a failed batch one by one; the entry that fails alone is skipped for a while."""
        if len(batch) > 1:
            for entry in batch:
                await self._import([entry], backup)
        else:
            self._shelf.skipped.add(batch[0].name, error)

    def _fitting(self, batch: Sequence[Entry], level: float) -> list[Entry]:
        """Return the entries that fit into Redis together, up to this part of maxmemory."""
        fitting: list[Entry] = []
        octets = 0
        for entry in batch:
            if entry.name in self._shelf.skipped:
                continue
            if self._watch.fits(octets + entry.size, level):
                fitting.append(entry)
                octets += entry.size
            elif not self._watch.may_import():
                self._is_short = True
            elif entry.name not in self._told and not fitting:
                self._told.add(entry.name)
                maillog.notice(
                    "warning", "a spooled message waits for more memory in Redis", id=entry.id, size=entry.size
                )
        return fitting

    async def _bring_in(self, batch: Sequence[Entry], levels: Mapping[str, float], backup: str) -> None:
        """Import each message for the backups with room; it goes to the backlogs of the others first."""
        loaded = await asyncio.to_thread(self._shelf.load, batch, backup)
        octets = sum(m.entry.size for m in loaded)
        welcome = {name for name, level in levels.items() if self._watch.fits(octets, level)}
        if backup and backup not in welcome:
            return  # Redis has just filled up; the files stay in the backlog
        due = [m.admitted_to(welcome) for m in loaded if not m.held]
        # Uncertain messages, which are not due yet, wait until there is room for all.
        held = [m for m in loaded if m.held] if self._watch.may_import() else []
        if not due and not held:
            return
        await self._put_by([m for m in loaded if not m.held], welcome)
        for m in loaded:
            if m.came_back:
                for name in m.released.destinations:
                    maillog.repeated(m.entry.id, name, "its file was put into the spool long after it was accepted")
        await self._write(due, held)
        # Also for copies imported before: that import may have ended before it made the job. And before the file is
        # deleted: a successor could not know of the copy otherwise.
        await self._dispatch([admitted.released for admitted in due])
        names = [admitted.file for admitted in due] + [m.entry.name for m in held]
        await asyncio.to_thread(self._shelf.delete, names, backup)
        self._tell(due, held)

    async def _put_by(self, loaded: Sequence[Loaded], welcome: Collection[str]) -> None:
        """Link messages into the backlogs of the backups that must wait for them."""
        left: defaultdict[str, list[str]] = defaultdict(list)
        for m in loaded:
            for name in m.released.destinations:
                if name not in welcome:
                    left[name].append(m.entry.name)
        for name, files in left.items():
            await asyncio.to_thread(self._shelf.put_by, name, files)

    async def _write(self, due: Sequence[Admitted], held: Sequence[Loaded]) -> None:
        def commands(pipe: Any) -> None:
            if due:
                changes.admit(pipe, self._shelf.name, due)
            if held:
                changes.restage(pipe, self._shelf.name, [(m.entry.id, m.record) for m in held])
                changes.hold(pipe, [Held(m.entry.id, m.released.digest, self._hold_seconds) for m in held])

        octets = sum(len(record) for _, record, released in due if released.destinations)
        octets += sum(len(m.record) for m in held)
        self._watch.sent(octets)
        try:
            await self._execute(commands)
        finally:
            self._watch.landed(octets)

    def _tell(self, due: Sequence[Admitted], held: Sequence[Loaded]) -> None:
        """Log and count the imported messages."""
        for m in held:
            if m.entry.state == STAGED:
                maillog.abandoned(m.entry.id, self._hold_seconds)
        for released in [admitted.released for admitted in due] + [m.released for m in held]:
            if released.destinations:
                metrics.unspooled.inc()
                maillog.unspooled(released.id, released.destinations)

    async def _forget(self) -> None:
        """Delete the notes of earlier imports whose files are durably deleted; in six looks a note is old enough."""
        if time.monotonic() < self._next_forgetting:
            return
        self._next_forgetting = time.monotonic() + _FORGET_AFTER / 6
        key = keys.IMPORTED + self._shelf.name
        until = self._watch.clock.now() - _FORGET_AFTER
        while True:
            reply = await self._connection.zrangebyscore(key, "-inf", until, start=0, num=_PAGE)
            members = cast("list[bytes]", reply)
            old = [note for note in map(text, members) if _is_note(note)]
            if junk := [member for member in members if not _is_note(text(member))]:
                await self._connection.zrem(key, *junk)  # not written by smtp-dup, and never deleted otherwise
            gone = await asyncio.to_thread(self._shelf.gone, old) if old else []
            if not gone:
                return
            await self._execute(partial(changes.unstage, spool=self._shelf.name, ids=gone, strike=True))

    async def _execute(self, commands: Callable[[Any], object]) -> None:
        async with self._connection.pipeline(transaction=True) as pipe:
            commands(pipe)
            await pipe.execute()

    async def _dispatch(self, released: Sequence[Released]) -> None:
        ids: defaultdict[str, list[str]] = defaultdict(list)
        for message in released:
            for destination in message.destinations:
                ids[destination].append(message.id)
        try:
            for destination, those in ids.items():
                await self._dispatcher.put(destination, those)
        except OSError as error:  # of the connection to Redis, not of the disk
            raise NoConnection(str(error)) from error


def _is_note(member: str) -> bool:
    file, name = changes.note_of(member)
    entry = writer.entry_of(file)
    return (is_id(file) and not name) or (bool(entry.state) and is_destination_name(name))


def _batches(entries: Sequence[Entry], most: int) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) >= _BATCH or size + entry.size > most):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.size
    if batch:
        yield batch
