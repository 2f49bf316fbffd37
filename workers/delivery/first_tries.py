"""First tries from memory: copies that relays of this host hand over as they release them, leased to this worker.

Such a copy begins its first try at once, without a job and without its body being fetched; its job comes later, and
finds it settled, or in hand. So whatever is given back untried gets a job with it. A copy that comes late, whose lease
may have ended, is claimed like any other. A lease in our name of which nothing has come (its relay was killed between
release and hand-over) is given back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from redis.exceptions import RedisError

from relay import maillog, metrics
from relay.handover.frames import FRESH_SECONDS, HandedCopy, Hello
from relay.ledger import keys
from relay.ledger.changes import Claim
from relay.mail.ids import text as as_text
from relay.redisio.pipeline import CommandBatch, Pipelines
from workers.delivery.bodies import Bodies
from workers.delivery.intake import Intake
from workers.delivery.leases import Leases
from workers.delivery.outcomes import Outcomes

_COPIES = 256  # in hand; with more there is a backlog, and jobs are the better way
_OCTETS = 4 << 20  # of bodies at hand
_LOOK_SECONDS = 15.0

Begin = Callable[[list[Claim], list[str]], None]  # what is ours, and the ids of what is to be claimed


class FirstTries:
    """The copies that a courier gets from memory."""

    def __init__(
        self,
        state_dir: Path,
        hello: Hello,
        bodies: Bodies,
        leases: Leases,
        outcomes: Outcomes,
        pipelines: Pipelines,
        *,
        wants_more: Callable[[], bool],
        begin: Begin,
    ) -> None:
        self._worker, self._destination = hello.worker, hello.destination
        self._bodies, self._leases, self._outcomes, self._pipelines = bodies, leases, outcomes, pipelines
        self._wants_more, self._begin = wants_more, begin
        self._taken = metrics.first_tries.labels(hello.destination)
        self._lost_a_relay = asyncio.Event()
        self._intake = Intake(state_dir, hello, self._room, self._take, self._lost_a_relay.set)
        self.tell, self.read_now = self._intake.tell, self._intake.read_now

    async def run(self) -> None:
        """Take copies; runs until cancelled."""
        self._intake.open()
        await asyncio.gather(self._intake.watch(), self._look_for_lost())

    def stop(self) -> None:
        """Want no more; what has been handed over is given back."""
        self._intake.stop()

    async def close(self) -> None:
        """Hang up, and give back what has come since."""
        self._intake.close()
        await self._give_back(await self._unknown())

    def _room(self) -> tuple[int, int]:
        if not self._wants_more():
            return 0, 0
        return max(0, _COPIES - len(self._leases.held)), max(0, _OCTETS - self._bodies.octets_ahead)

    def _take(self, copies: Sequence[HandedCopy]) -> None:
        now, held = time.monotonic(), self._leases.held
        ours: list[Claim] = []
        late: list[str] = []
        for copy in copies:
            if copy.id in held:
                continue
            self._bodies.give(copy.id, copy.record)
            if 0 <= now - copy.leased_at < FRESH_SECONDS:
                ours.append(Claim(copy.id, copy.accepted_at, size=len(copy.record)))
            else:
                late.append(copy.id)
        self._leases.take_fresh([claim.id for claim in ours])
        self._taken.inc(len(ours))
        self._begin(ours, late)

    async def _look_for_lost(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._lost_a_relay.wait()
            self._lost_a_relay.clear()
            if suspects := await self._unknown():
                await asyncio.sleep(FRESH_SECONDS + 1.0)  # what comes later than that is claimed anew
                self._intake.read_now()
                await self._give_back(suspects & await self._unknown())

    async def _unknown(self) -> set[str]:
        """Return what is leased to us by the ledger, and not in hand; nothing while Redis is away."""
        question = CommandBatch()
        question.add(("HGETALL", keys.HOLDERS + self._destination))
        try:
            (answer,) = await self._pipelines.ask(question)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("looking for leases", error)
            return set()
        # RESP 3, or 2.
        holders = answer.items() if isinstance(answer, dict) else zip(answer[::2], answer[1::2], strict=True)
        ours = {as_text(message_id) for message_id, holder in holders if as_text(holder).split(" ")[0] == self._worker}
        return ours - self._leases.held

    async def _give_back(self, ids: set[str]) -> None:
        if ids:
            async with self._leases.leaving(ids):
                await self._outcomes.give_back(sorted(ids), with_job=True)
