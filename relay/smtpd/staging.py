"""Makes copies durable: stage before the final dot, then release, discard or hold by the primary's reply.

All sessions of a process share one GroupCommit, so that one fsync serves many messages. A message that Redis does not
take in time goes to the spool; if that fails too, ``stage`` raises NotDurable. Later changes (release, discard, hold)
raise nothing: they are repeated until Redis answers, for as long as the process lives. A note in the spool keeps a
release or discard over a crash; without a spool the reconciler repairs the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import limits, maillog, metrics
from relay.handover.frames import FRESH_SECONDS, HandedCopy, Hello
from relay.handover.handover import Handover, Offer
from relay.ledger import changes
from relay.ledger.changes import COVERING, Held, Released, Staged
from relay.ledger.group_commit import GroupCommit
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.envelope import Envelope
from relay.mail.record import Message
from relay.redisio.pipeline import CommandBatch, Pipelines
from relay.repeated import Backoff, until_done
from relay.spool.writer import Spool
from relay.trace.events import IN_REDIS, IN_SPOOL

_LARGE = 256 << 10  # larger bodies go alone, over connections of their own
_SPOOL_SECONDS = 30.0  # for one change in the spool: a disk that hangs is treated as full
_FORGOT = "the ledger was emptied, or became an older one, between staging and release"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between the tries of a change
_LATE_SECONDS = 60.0  # after a time-out, a command sent before it may still reach Redis for this long


class NotDurable(Exception):
    """The copy could be written neither to Redis nor to the spool.

    ``is_own``: this process lacks descriptors, memory or threads, which is temporary; Redis and the disk may be well.
    """

    def __init__(self, reason: str, *, is_own: bool = False) -> None:
        super().__init__(reason)
        self.is_own = is_own


class Staging:
    """The ledger and the spool as a session uses them: it does not see which of the two holds a copy."""

    def __init__(
        self,
        connection: Redis,
        bulk: Redis,
        dispatcher: Dispatcher,
        watch: Monitor,
        *,
        stage_seconds: float,
        deadline_seconds: float,
        hold_seconds: float,
        spool: Spool | None = None,
        covering: Callable[[Released], Awaitable[None]] | None = None,
        awaits_release: bool = True,
        handover: Handover | None = None,
    ) -> None:
        """``covering`` is told of a release that stands for an uncertain message too.

        Without ``awaits_release``, ``release`` waits only until it is on its way to Redis. With a ``handover``, workers
        of this host get copies at once.
        """
        self._small = GroupCommit(connection, seconds=stage_seconds)
        self._large = GroupCommit(bulk, seconds=stage_seconds)
        self._dispatcher = dispatcher
        self._watch = watch
        self.now = watch.clock.now  # the time by Redis's clock, seconds since the epoch
        self._stage_seconds = stage_seconds
        self._deadline_seconds = deadline_seconds
        self._hold_seconds = hold_seconds
        self._spool = spool
        self._covering = covering
        self._awaits_release = awaits_release
        self._handover = handover or Handover()
        self._wires = Pipelines(connection, seconds=stage_seconds)
        self._handover.on_handed = self._dispatch
        self._handover.on_refused = lambda holder, copies: self._repeat(partial(self._take_back, holder, copies))
        self._doubtful: set[str] = set()  # ids whose stage got no answer: Redis may have them nevertheless
        self._repeating: set[asyncio.Task[None]] = set()

    async def stage(self, message: Message) -> str:
        """Put a message on stable storage, not yet due at any backup; returns which. Raises NotDurable."""
        large = len(message.body) > _LARGE  # compressing and encrypting it would block the other clients
        record = await asyncio.to_thread(message.packed) if large else message.packed()
        size = sum(map(len, record))
        envelope = message.envelope
        trouble = self._watch.objection(size)
        if not trouble:
            trouble = await self._to_redis(envelope, record, size)
            if not trouble:
                self._handover.keep(envelope.id, record, envelope.destinations)
                return IN_REDIS
        try:
            await self._to_spool(envelope, record, trouble)
        except OSError as error:
            is_own = self._watch.is_own or limits.is_own(error)
            trouble = f"{trouble}; spool: {error.strerror or error}"
            untidy = self._spool is not None and self._spool.has(envelope.id)
            hopeless = envelope.id in self._doubtful or not self._watch.may_squeeze_in(size)
            # A Redis that is nearly full is better than no copy.
            if untidy or hopeless or await self._to_redis(envelope, record, size):
                if untidy or envelope.id in self._doubtful:
                    self.discard(envelope.id)
                raise NotDurable(trouble, is_own=is_own or self._watch.is_own) from error
            return IN_REDIS
        return IN_SPOOL

    async def _to_redis(self, envelope: Envelope, record: tuple[bytes, ...], size: int) -> str:
        """Stage a record in Redis; returns "", or the reason of the failure."""
        staged = Staged(envelope.id, record, self.now() + self._deadline_seconds)
        self._watch.sent(size)
        try:
            await (self._large if size > _LARGE else self._small).submit("stage", staged, size)
        except (RedisError, OSError, TimeoutError) as error:
            self._watch.failed(error)
            self._doubtful.add(envelope.id)
            return f"{type(error).__name__}: {error}".rstrip(": ")
        finally:
            self._watch.landed(size)
        return ""

    async def _to_spool(self, envelope: Envelope, record: tuple[bytes, ...], reason: str) -> None:
        """Write a record to the spool. Raises OSError; if ``has`` is then true, part of it may be left."""
        if self._spool is None:
            raise OSError("there is none")
        try:
            async with asyncio.timeout(_SPOOL_SECONDS):
                large = sum(map(len, record)) > _LARGE
                whole = await asyncio.to_thread(b"".join, record) if large else b"".join(record)
                await self._spool.write(envelope.id, whole)
        except (OSError, RuntimeError, MemoryError) as error:  # OSError includes TimeoutError
            with contextlib.suppress(OSError, RuntimeError, MemoryError):
                async with asyncio.timeout(1):
                    await self._spool.discard(envelope.id)
            if isinstance(error, OSError):
                raise
            raise OSError(errno.ENOMEM, str(error) or "no memory") from error  # no thread, no memory
        metrics.spooled.inc()
        maillog.spooled(envelope, reason)

    def release(self, released: Released) -> Awaitable[None]:
        """Make a staged message due at its backups, to be awaited for the first try; repetitions run in the background.

        Without ``awaits_release`` the first try runs there too, once it is sent. Only the loss of this process and of
        Redis at that moment leaves the message staged: then its copies are due after the hold, as uncertain ones.
        """
        if self._spool is not None and self._spool.has(released.id):
            return self._release_spooled(self._spool, released)
        if self._watch.is_down:
            self._handover.forget(released.id)
            return self._release_later(released)
        offer = self._handover.offer(released.id, released.destinations)
        leased = released if offer is None else released._replace(holders=offer.holders)
        if self._awaits_release:
            return self._see_to(released, offer, self._small.submit("release", leased))
        sent = asyncio.get_running_loop().create_future()
        answer = self._small.submit("release", leased, sent=sent)
        self._repeat(partial(self._see_to, released, offer, answer))
        return sent

    async def _release_spooled(self, spool: Spool, released: Released) -> None:
        if await self._in_spool(spool.release, released.id):
            self._doubtful.discard(released.id)  # the importer merges it with what Redis may have
        else:  # it has just been moved to Redis
            await self.release(released)

    async def _see_to(self, released: Released, offer: Offer | None, answer: asyncio.Future[Any]) -> None:
        """Wait for the answer to a release, and see to what follows from it."""
        try:
            is_new = await answer
            if offer is not None and is_new:
                offer.send(self.now())
        except (RedisError, OSError, TimeoutError) as error:
            self._watch.failed(error)
            maillog.ledger_trouble(f"release {released.id}", error)
            if offer is not None:
                offer.give_up()
            await self._release_later(released, offer)
            return
        # Also when Redis had it done already, by a try that got no answer. A superfluous job does no harm.
        for n, destination in enumerate(released.destinations):
            if offer is None or not is_new or not offer.has(n):  # else with the hand-over, or its refusal
                self._dispatcher.add(destination, released.id)
        if not is_new:
            if offer is not None:
                offer.give_up()
            self._repeat(lambda: self._look_for(released))
        elif is_new == COVERING and self._covering:
            self._repeat(partial(self._covering, released))

    async def _release_later(self, released: Released, offer: Offer | None = None) -> None:
        """Repeat a release in the background; ``offer`` is what its first try has leased, if Redis has taken that."""
        if self._spool is not None:
            await self._noted(self._spool.note_release(released))
        self._repeat(lambda: self._released_late(released, offer))

    def discard(self, message_id: str) -> None:
        """Delete a message that the primary refused; repeated in the background until Redis answers."""
        self._handover.forget(message_id)
        self._repeat(lambda: self._discard(message_id))

    def hold(self, message_id: str, digest: str) -> None:
        """Mark a message as uncertain; repeated in the background until Redis answers."""
        self._handover.forget(message_id)
        self._repeat(lambda: self._hold(message_id, digest))

    async def drain(self) -> None:
        """Finish the changes under way; bounded, since notes in the spool and the reconciler complete the rest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._small.drain(), self._stage_seconds * 2)
        if self._repeating:
            await asyncio.wait(self._repeating, timeout=self._stage_seconds)
        await self._dispatcher.drain()
        await self._wires.close()

    def _dispatch(self, destination: str, ids: Sequence[str]) -> None:
        for message_id in ids:
            self._dispatcher.add(destination, message_id)

    async def _take_back(self, holder: Hello, copies: Sequence[HandedCopy]) -> None:
        """End the leases of copies that could not be handed over; then they get their job."""
        ids = [copy.id for copy in copies]
        await self._unlease(min(copy.leased_at for copy in copies), [(holder.destination, holder.worker)], ids)
        self._dispatch(holder.destination, ids)

    async def _unlease(self, since: float, holders: Sequence[tuple[str, str]], ids: Sequence[str]) -> None:
        """End leases, by destination and worker, of what the worker never gets.

        Old ones are left to the worker: it gives back what has not come, and may have claimed it by then.
        """
        if time.monotonic() - since < FRESH_SECONDS:
            batch = CommandBatch()
            for destination, worker in holders:
                changes.unlease(batch, destination, worker, ids)
            await self._wires.ask(batch)

    async def _in_spool(self, change: Callable[[str], Awaitable[bool]], message_id: str) -> bool:
        """Change a message in the spool; returns whether it is there. A failed change is repeated in the background."""
        try:
            async with asyncio.timeout(_SPOOL_SECONDS):
                return await change(message_id)
        except OSError as error:
            maillog.spool_trouble(f"change of {message_id}", error)
            self._repeat(lambda: change(message_id))
            return True

    @staticmethod
    async def _noted(note: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(_SPOOL_SECONDS):
                await note
        except OSError as error:  # tolerable: only a crash before Redis is back needs the note
            maillog.spool_trouble("note", error)

    async def _look_for(self, released: Released) -> None:
        """Log a lost copy if Redis lost data between the staging and the release of a message."""
        if await self._watch.has_forgotten() and not await self._watch.has(released.id):
            metrics.copies_lost.inc()
            maillog.notice("error", "copy lost", id=released.id, copies=",".join(released.destinations), reason=_FORGOT)

    async def _released_late(self, released: Released, offer: Offer | None) -> None:
        if not await self._small.submit("release", released):
            await self._look_for(released)
            if offer is not None:  # the first try was done, and its job must not wait for a lease that nobody uses
                held = zip(released.destinations, offer.holders, strict=True)
                await self._unlease(offer.at, [pair for pair in held if pair[1]], [released.id])
        # Also when there was nothing to release: the first try may have succeeded without an answer.
        for destination in released.destinations:
            self._dispatch(destination, [released.id])
        if self._spool is not None:
            await self._spool.strike(released.id)

    async def _discard(self, message_id: str) -> None:
        doubtful = message_id in self._doubtful
        if self._spool is not None:
            if await self._spool.discard(message_id) and not doubtful:
                return
            if doubtful or self._watch.is_down:
                await self._noted(self._spool.note_discard(message_id))
        await self._small.submit("discard", message_id)
        if doubtful:
            # The stage may still be under way on another connection.
            await asyncio.sleep(_LATE_SECONDS)
            await self._small.submit("discard", message_id)
            self._doubtful.discard(message_id)
        if self._spool is not None:
            await self._spool.strike(message_id)

    async def _hold(self, message_id: str, digest: str) -> None:
        if self._spool is not None and await self._spool.hold(message_id):
            self._doubtful.discard(message_id)
            return
        await self._small.submit("hold", Held(message_id, digest, self._hold_seconds))

    def _repeat(self, change: Callable[[], Any]) -> None:
        pauses = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)

        def trouble(error: Exception) -> None:
            if not isinstance(error, RedisError | OSError):
                raise error
            if isinstance(error, RedisError):
                self._watch.failed(error)
            if pauses.is_at_first:
                maillog.ledger_trouble("a change waits for Redis", error)

        task = asyncio.get_running_loop().create_task(until_done(change, trouble, pauses))
        self._repeating.add(task)
        task.add_done_callback(self._repeating.discard)
