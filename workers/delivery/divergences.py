"""What a backup answered otherwise than the primary did: counted with each outcome, see relay/ledger/divergence.py.

A copy that goes through at its first try costs one count in memory, by domain, which is written every few seconds. A
worker that is killed loses those of these seconds, nothing else; without Redis they are written later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

from redis.exceptions import RedisError

from relay import maillog
from relay.config.model import DivergenceSettings
from relay.ledger import divergence
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence import DEFERRED, GIVEN_UP, REFUSED, Answer, Coverage, Noted
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.mail.reply_text import Known
from relay.redisio.pipeline import CommandBatch, Pipelines
from workers.delivery.copy import Copy

_WRITE_SECONDS = 5.0
_AT_ONCE = 1000  # domains in one script


class Diverged(NamedTuple):
    """What a copy adds to groups, when its new state is written; ``attempts`` is how often it was tried before."""

    envelope: Envelope
    attempts: int
    noted: list[Noted]


class Divergences:
    """The divergence of one destination, as one worker process counts it."""

    def __init__(self, destination: Destination, settings: DivergenceSettings, pipelines: Pipelines, helo: str) -> None:
        self._destination = destination
        self._pipelines = pipelines
        self._ours = Known(ours=(helo,), server=destination.host)
        self._coverage = Coverage()
        self.noise = settings.noise

    def count(self, copy: Copy, *, is_given_up: bool) -> tuple[CopyState, Diverged | None]:
        """Return a copy's state with its answers counted, and what is to be noted with it.

        ``is_given_up``: what is put off is not tried again.
        """
        recipients = copy.message.envelope.recipients
        for i in copy.yes:
            self._coverage.add(recipients[i].domain, taken=1)
        if not (copy.later or copy.never):
            return copy.state, None
        later = copy.later if is_given_up else {i: r for i, r in copy.later.items() if i not in copy.uncounted}
        answers = self._answers(copy, copy.never, REFUSED) | self._answers(
            copy, later, GIVEN_UP if is_given_up else DEFERRED
        )
        envelope, name = copy.message.envelope, self._destination.name
        state, noted = divergence.count(copy.state, envelope, name, answers, self._ours)
        for group in noted:
            is_deferred = group.answer.kind == DEFERRED
            for i in group.seen:
                domain = envelope.recipients[i].domain
                self._coverage.add(domain, deferred=is_deferred, refused=not is_deferred)
        return state, Diverged(envelope, copy.state.attempts, noted) if noted else None

    def _answers(self, copy: Copy, replies: Mapping[int, Reply], kind: str) -> dict[int, Answer]:
        soft = self._destination.soft_bounce and kind != REFUSED
        return {
            i: Answer(kind, str(copy.stages.get(i, divergence.OWN)), reply, soft and reply.is_permanent)
            for i, reply in replies.items()
        }

    def note(self, pipe: Any, diverged: Diverged | None) -> None:
        """Add to a MULTI, in front of the copy's new state, what it says of groups."""
        if diverged is not None:
            divergence.note(pipe, self._destination.name, diverged.envelope, diverged.attempts, diverged.noted)

    async def report(self) -> None:
        """Write the counts by domain now and then; runs until cancelled."""
        while True:
            await asyncio.sleep(_WRITE_SECONDS)
            await self.write()

    async def write(self) -> None:
        """Write what has been counted by domain; what cannot be written now is kept."""
        left = self._coverage.take()
        try:
            while left:
                page = dict(list(left.items())[:_AT_ONCE])
                batch = CommandBatch()
                divergence.cover(batch, self._destination.name, page)
                await self._pipelines.ask(batch)
                for domain in page:
                    del left[domain]
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("domains of a destination", error)
            self._coverage.give_back(left)
