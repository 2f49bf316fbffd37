"""Staging: stage, release, discard and hold, group-committed with whatever else is going on.

Every message of every session of a process goes through one GroupCommit, so that one fsync serves
many. A stage that Redis does not take in time goes to the spool, and only without a spool raises NotDurable; what
must be told to Redis later (a release, a discard) is repeated until Redis has answered, for as long as the process
lives, with a note in the spool for the case that it does not, and without a spool is left to the reconciler.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import limits, maillog, metrics
from relay.ledger.changes import Held, Released, Staged
from relay.ledger.group_commit import GroupCommit
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.envelope import Envelope
from relay.mail.record import Message
from relay.repeated import Backoff, until_done
from relay.spool.writer import Spool

_LARGE = 256 << 10  # bodies over this travel alone, on connections of their own
_SPOOL_SECONDS = 30.0  # for one change in the spool: a disk that hangs is as good as full
_FORGOT = "the ledger was emptied, or became an older one, between staging and release"
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds until a change that Redis has not taken is tried again
_LATE_SECONDS = 60.0  # after a time-out, this long until what was on its way has come or never will


class NotDurable(Exception):
    """The copy could be written neither to Redis nor to the spool.

    ``is_own``: for want of descriptors, memory or threads of ours. Redis and the disk may be well, and this passes.
    """

    def __init__(self, reason: str, *, is_own: bool = False) -> None:
        super().__init__(reason)
        self.is_own = is_own


class Staging:
    """The session's view of durability."""

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
    ) -> None:
        self._small = GroupCommit(connection, seconds=stage_seconds)
        self._large = GroupCommit(bulk, seconds=stage_seconds)
        self._dispatcher = dispatcher
        self._watch = watch
        self._stage_seconds = stage_seconds
        self._deadline_seconds = deadline_seconds
        self._hold_seconds = hold_seconds
        self._spool = spool
        self._doubtful: set[str] = set()  # ids whose stage got no answer: Redis may have them all the same
        self._repeating: set[asyncio.Task[None]] = set()

    def now(self) -> float:
        """Return the time by Redis's clock, seconds since the epoch."""
        return time.time() + self._watch.clock_offset

    async def stage(self, message: Message) -> None:
        """Put a message on stable storage, not yet due for anybody. Raises NotDurable."""
        large = len(message.body) > _LARGE  # to compress and seal it takes its time, which is not everybody's
        record = await asyncio.to_thread(message.packed) if large else message.packed()
        size = sum(map(len, record))
        envelope = message.envelope
        trouble = self._watch.objection(size)
        if not trouble:
            trouble = await self._to_redis(envelope, record)
            if not trouble:
                return
        try:
            await self._to_spool(envelope, record, trouble)
        except OSError as error:
            is_own = self._watch.is_own or limits.is_own(error)
            trouble = f"{trouble}; spool: {error.strerror or error}"
            untidy = self._spool is not None and self._spool.has(envelope.id)
            hopeless = envelope.id in self._doubtful or not self._watch.may_squeeze_in(size)
            # A Redis that is only rather full is better than nothing.
            if untidy or hopeless or await self._to_redis(envelope, record):
                if untidy or envelope.id in self._doubtful:
                    self.discard(envelope.id)
                raise NotDurable(trouble, is_own=is_own or self._watch.is_own) from error

    async def _to_redis(self, envelope: Envelope, record: tuple[bytes, ...]) -> str:
        """Return why it could not be written, or "" when it was."""
        staged, size = Staged(envelope.id, record, self.now() + self._deadline_seconds), sum(map(len, record))
        if size > _LARGE:
            future = self._large.submit("stage large", staged, size)
        else:
            future = self._small.submit("stage", staged, size)
        self._watch.sent(size, future)
        try:
            await future
        except (RedisError, OSError, TimeoutError) as error:
            self._watch.failed(error)
            self._doubtful.add(envelope.id)
            return f"{type(error).__name__}: {error}".rstrip(": ")
        return ""

    async def _to_spool(self, envelope: Envelope, record: tuple[bytes, ...], reason: str) -> None:
        """Write to the spool. Raises OSError; if ``has`` then says so, something may be left."""
        if self._spool is None:
            raise OSError("there is none")
        try:
            async with asyncio.timeout(_SPOOL_SECONDS):
                large = sum(map(len, record)) > _LARGE
                whole = await asyncio.to_thread(b"".join, record) if large else b"".join(record)
                await self._spool.write(envelope.id, whole)
        except (OSError, RuntimeError, MemoryError) as error:  # TimeoutError is an OSError
            with contextlib.suppress(OSError, RuntimeError, MemoryError):
                async with asyncio.timeout(1):
                    await self._spool.discard(envelope.id)
            if isinstance(error, OSError):
                raise
            raise OSError(errno.ENOMEM, str(error) or "no memory") from error  # no thread, no memory
        metrics.spooled.inc()
        maillog.spooled(envelope, reason)

    async def release(self, released: Released) -> None:
        """Make a staged message due at its backups. Returns at the first try's end; later ones go on behind."""
        spool = self._spool
        if spool is not None and spool.has(released.id) and await self._in_spool(spool.release, released.id):
            self._doubtful.discard(released.id)  # the importer sees to it
            return
        if not self._watch.is_down:
            try:
                is_new = await self._small.submit("release", released)
            except (RedisError, OSError, TimeoutError) as error:
                self._watch.failed(error)
                maillog.ledger_trouble(f"release {released.id}", error)
            else:
                # Whatever its result: a repetition on another connection finds it done. A job too many does no harm.
                self._dispatch(released)
                if not is_new:
                    self._repeat(lambda: self._look_for(released))
                return
        if self._spool is not None:
            await self._noted(self._spool.note_release(released))
        self._repeat(lambda: self._released_late(released))

    def discard(self, message_id: str) -> None:
        """Forget a message that the primary refused; repeated until Redis has answered."""
        self._repeat(lambda: self._discard(message_id))

    def hold(self, message_id: str, digest: str) -> None:
        """Mark a message as uncertain; repeated until Redis has answered."""
        self._repeat(lambda: self._hold(message_id, digest))

    async def drain(self) -> None:
        """Finish what is under way; bounded, since notes in the spool and the reconciler finish the rest."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._small.drain(), self._stage_seconds * 2)
        if self._repeating:
            await asyncio.wait(self._repeating, timeout=self._stage_seconds)
        await self._dispatcher.drain()

    def _dispatch(self, released: Released) -> None:
        for destination in released.destinations:
            self._dispatcher.add(destination, released.id)

    async def _in_spool(self, change: Callable[[str], Awaitable[bool]], message_id: str) -> bool:
        """Change a message's state if it is in the spool; one that the disk refuses is repeated behind."""
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
        except OSError as error:  # only a crash before Redis is back would need it
            maillog.spool_trouble("note", error)

    async def _look_for(self, released: Released) -> None:
        """Say it where the ledger has forgotten a message between its staging and its release."""
        if await self._watch.has_forgotten() and not await self._watch.has(released.id):
            metrics.copies_lost.inc()
            maillog.notice("error", "copy lost", id=released.id, copies=",".join(released.destinations), reason=_FORGOT)

    async def _released_late(self, released: Released) -> None:
        if not await self._small.submit("release", released):
            await self._look_for(released)
        # Whatever its result: the first try may have been done without our hearing of it.
        self._dispatch(released)
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
            # The stage may be on another connection still.
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
