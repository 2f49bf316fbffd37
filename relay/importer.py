"""The importer: moves what is in the spool into the ledger, oldest first, under the same id, when Redis is back.

One process per spool does it (a lock that dies with it). It touches only what no living process will touch again:
released and held messages, and what dead processes left; a staged message of a dead one becomes uncertain. New
mail goes first: it rests three times as long as each batch took, and stops while stages fail or Redis fills up.
Every step may be cut off and repeated: an id is noted as brought in, in the script that brings it in, until its
file is gone for good. What cannot be read is set aside in the spool's folder ``corrupt``, never deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from relay import ledger, maillog, metrics
from relay.dispatch import Dispatcher
from relay.envelope import Destination
from relay.ledger import Held, Released
from relay.shelf import Shelf
from relay.spool import DISCARD, STAGED, Entry
from relay.watch import Watch

T = TypeVar("T")

_LOOK_SECONDS = 1.0
_BATCH = 100
_BATCH_BYTES = 1 << 20  # Redis is not held up for longer than by a group of new mail
_PAGE = 1000
_SHARE = 3  # seconds of rest for each second of work
_FORGET_AFTER = 60.0  # seconds; by then whatever was on its way to Redis has come or never will
_TRIES = 3
_SKIP_SECONDS = 600.0
_TROUBLE_SECONDS = 10.0  # until a disk that refused is asked again


class Importer:
    """The import task of one relay process."""

    def __init__(
        self,
        folder: Path,
        connection: Redis,
        dispatcher: Dispatcher,
        watch: Watch,
        *,
        destinations: Sequence[Destination],
        hold_seconds: float,
    ) -> None:
        self._shelf = Shelf(folder)
        self._connection = connection
        self._dispatcher = dispatcher
        self._watch = watch
        self._destinations = destinations
        self._hold_seconds = hold_seconds
        self._stopping = asyncio.Event()
        self._told: set[str] = set()  # names of files that do not fit, told once
        self._skipped: dict[str, float] = {}  # what Redis refused, and when
        self.passes = 0  # through all that there was
        self.waits = 0  # for calm, or room

    async def run(self) -> None:
        """Wait for the lock, then import until ``stop``."""
        lock = -1
        try:
            while not self._stopping.is_set():
                try:
                    if lock < 0:
                        lock = await asyncio.to_thread(self._shelf.take_over)
                    if lock >= 0 and self._watch.may_import():
                        await self._once()
                    else:
                        self.waits += 1
                except OSError as error:
                    maillog.spool_trouble("import", error)
                    await self._rest(_TROUBLE_SECONDS)
                except RedisError as error:
                    self._watch.failed(error)
                await self._rest(_LOOK_SECONDS)
        finally:
            if lock >= 0:
                os.close(lock)

    def stop(self) -> None:
        """End after the batch in hand."""
        self._stopping.set()

    async def _rest(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    # One pass ---------------------------------------------------------------------------------------------------

    async def _once(self) -> None:
        found = await asyncio.to_thread(self._shelf.survey)
        await self._introduce()
        # First of all: what a stage that timed out has left in Redis must not become due by itself.
        for page in _pages(found.ids):
            await self._execute(partial(ledger.unstage, spool=self._shelf.name, ids=page))
        await self._settle_notes(found.notes)
        await self._import(found.mail)
        await self._forget()
        await asyncio.to_thread(self._shelf.bury, found.dead)
        self.passes += 1

    async def _introduce(self) -> None:
        """Make known where spooled copies go, as set up when they came: perhaps by a relay that never met Redis."""
        if not self._destinations:
            return
        definitions = {d.name: d.to_json() for d in self._destinations}
        known = await asyncio.to_thread(self._shelf.definitions, definitions)
        async with self._connection.pipeline(transaction=True) as pipe:
            for name, text in known.items():
                pipe.hsetnx(ledger.DESTINATIONS, name, text)
            await pipe.execute()
        self._destinations = ()

    async def _settle_notes(self, notes: Sequence[Entry]) -> None:
        """Do what a dead process was about to tell Redis."""
        for page in _pages(notes):
            accepted = await asyncio.to_thread(self._shelf.notes, page)
            refused = [e.id for e in page if e.state == DISCARD]
            if accepted:
                await self._execute(partial(ledger.release, messages=accepted))
            if refused:
                await self._execute(partial(ledger.discard, ids=refused))
            self._dispatch(accepted)
            await asyncio.to_thread(self._shelf.delete, [e.name for e in page])

    async def _import(self, entries: Sequence[Entry]) -> None:
        for batch in _batches(entries):
            tries = 0
            while not self._stopping.is_set():
                if not self._watch.may_import():
                    self.waits += 1
                    await self._rest(_LOOK_SECONDS)
                    continue
                started = time.monotonic()
                try:
                    await self._bring_in([e for e in batch if self._fits(e)])
                except RedisError as error:
                    self._watch.failed(error)
                    # Between two tries it was seen to be well: one record that it does not take must not stop others.
                    tries += not isinstance(error, OutOfMemoryError)
                    if tries >= _TRIES:
                        await self._skip(batch, error)
                        break
                else:
                    await self._rest(_SHARE * (time.monotonic() - started))
                    break

    async def _skip(self, batch: Sequence[Entry], error: RedisError) -> None:
        if len(batch) > 1:
            for entry in batch:
                await self._import([entry])
        else:
            maillog.ledger_trouble(f"import of {batch[0].id}", error)
            self._skipped[batch[0].name] = time.monotonic()

    def _fits(self, entry: Entry) -> bool:
        if time.monotonic() - self._skipped.get(entry.name, float("-inf")) < _SKIP_SECONDS:
            return False
        if self._watch.fits(entry.size):
            return True
        if entry.name not in self._told:
            self._told.add(entry.name)
            maillog.notice("warning", "a spooled message waits for more memory in Redis", id=entry.id, size=entry.size)
        return False

    async def _bring_in(self, batch: Sequence[Entry]) -> None:
        loaded = await asyncio.to_thread(self._shelf.load, batch)
        if not loaded:
            return
        ready = [m.released for m in loaded if not m.held]
        held = [m.released for m in loaded if m.held]

        def commands(pipe: Any) -> None:
            ledger.restage(pipe, self._shelf.name, [(m.entry.id, m.record) for m in loaded])
            if ready:
                ledger.release(pipe, ready)
            if held:
                ledger.hold(pipe, [Held(m.id, m.digest, self._hold_seconds) for m in held])

        landing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch.sent(sum(len(m.record) for m in loaded), landing)
        try:
            await self._execute(commands)
        finally:
            landing.set_result(None)
        # Also for what had been brought in before: nothing says that we lived long enough then to make its job.
        self._dispatch(ready)
        await asyncio.to_thread(self._shelf.delete, [m.entry.name for m in loaded])
        metrics.unspooled.inc(len(loaded))
        for m in loaded:
            if m.entry.state == STAGED:
                maillog.abandoned(m.entry.id, self._hold_seconds)
            maillog.unspooled(m.entry.id, m.released.destinations)

    async def _forget(self) -> None:
        """Strike the notes of what was brought in some time ago, once the files are gone for good."""
        key = ledger.IMPORTED + self._shelf.name
        now = await self._connection.time()
        while True:
            reply = await self._connection.zrangebyscore(key, "-inf", now[0] - _FORGET_AFTER, start=0, num=_PAGE)
            old = [i.decode() for i in cast("list[bytes]", reply)]
            ids = await asyncio.to_thread(self._shelf.gone, old) if old else []
            if not ids:
                return
            await self._execute(partial(ledger.unstage, spool=self._shelf.name, ids=ids, strike=True))

    async def _execute(self, commands: Callable[[Any], object]) -> None:
        async with self._connection.pipeline(transaction=True) as pipe:
            commands(pipe)
            await pipe.execute()

    def _dispatch(self, released: Sequence[Released]) -> None:
        for message in released:
            for destination in message.destinations:
                self._dispatcher.add(destination, message.id)


def _pages(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[i : i + _PAGE] for i in range(0, len(items), _PAGE)]


def _batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) >= _BATCH or size + entry.size > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.size
    if batch:
        yield batch
