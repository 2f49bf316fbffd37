"""The bodies of claimed copies: small ones fetched ahead in a few round trips, a large one when its turn comes.

A large body travels on a connection of its own, so that it does not hold up leases and outcomes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from relay.ledger import archive, keys
from relay.ledger.changes import Claim
from relay.mail.envelope import MalformedRecord
from relay.mail.record import BodyElsewhere, Message, TooLarge
from relay.redisio.pipeline import CommandBatch, Pipelines
from workers.delivery.large_fetch import fetch

_LARGE = 256 << 10  # octets of a stored record
_AT_ONCE = 4 << 20
_TURNS = 2  # fetched alone at once: the first are on their way to the server while others come


class Bodies:
    """Fetches messages for one worker process."""

    def __init__(self, wires: Pipelines, bulk: Redis, folder: Path | None = None) -> None:
        """``folder`` has the bodies that were moved out of Redis on this host."""
        self._folder = folder
        self._wires = wires
        self._bulk = bulk
        self._turns = asyncio.Semaphore(_TURNS)
        self._ahead: dict[str, Message] = {}

    async def read_ahead(self, claims: Sequence[Claim]) -> None:
        """Fetch the small ones of these. Raises RedisError."""
        group: list[str] = []
        total = 0
        for claim in claims:
            if 0 < claim.size <= _LARGE:  # else it is told when its turn comes
                if total + claim.size > _AT_ONCE:
                    await self._fetch(group)
                    group, total = [], 0
                group.append(claim.id)
                total += claim.size
        await self._fetch(group)

    async def take(self, message_id: str) -> Message | None:
        """Return a message, None when there is none. Raises RedisError, BodyElsewhere, MalformedRecord."""
        message = self._ahead.pop(message_id, None)
        if message is None:
            async with self._turns:
                # A view: a slice of it, the body, is no copy.
                try:
                    record = cast("bytes | None", await fetch(self._bulk, keys.MESSAGE + message_id))
                except ResponseError as error:
                    if not str(error).startswith("WRONGTYPE"):
                        raise
                    raise MalformedRecord("another type of key") from error
                # In a thread: to unfold, open and check a large one would stop the other copies of this process.
                message = await asyncio.to_thread(self._unpacked, message_id, record) if record is not None else None
        return message

    async def is_owed(self, message_id: str, destination: str) -> bool:
        """Return whether a copy still waits; its body goes with the last one. Raises RedisError."""
        batch = CommandBatch()
        batch.add(("ZSCORE", keys.PENDING + destination, message_id))
        (score,) = await self._wires.ask(batch)
        return score is not None

    def give(self, message_id: str, record: bytes) -> None:
        """Take a record that is at hand. One that cannot be read as it is waits for its turn, and is told then."""
        try:
            message = Message.unpack(record, message_id, _LARGE)
        except (BodyElsewhere, MalformedRecord, TooLarge):
            return
        self._ahead[message_id] = message

    @property
    def octets_ahead(self) -> int:
        """How much memory the messages at hand take."""
        return sum([len(message.body) for message in self._ahead.values()])

    def at_hand(self, message_id: str) -> Message | None:
        """Return a message that was fetched ahead, else None; ``take`` returns it all the same."""
        return self._ahead.get(message_id)

    def drop(self, ids: Sequence[str]) -> None:
        """Forget what was fetched ahead and is not delivered now."""
        for message_id in ids:
            self._ahead.pop(message_id, None)

    async def _fetch(self, ids: Sequence[str]) -> None:
        if ids:
            batch = CommandBatch()
            batch.add(("MGET", *[keys.MESSAGE + message_id for message_id in ids]))
            (records,) = await self._wires.ask(batch)
            for message_id, record in zip(ids, cast("list[bytes | None]", records), strict=True):
                if record is not None:
                    self.give(message_id, record)

    def _unpacked(self, message_id: str, record: bytes) -> Message:
        try:
            return Message.unpack(record, message_id)
        except BodyElsewhere as place:
            return Message.unpack(archive.fetch(place, message_id, self._folder), message_id)
