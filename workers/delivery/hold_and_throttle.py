"""What an operator wants of one destination, as this worker keeps to it: a hold, and a throttle that all workers share.

Held, no copy is begun and no job is taken; what is under way ends. The throttle's rate is kept by grants: this worker
may begin so many copies within a second as Redis has allowed it, and asks for more when they are used up and others
wait. Connections are shared out by place: each worker gets its part of them, and one without a part rests. Until
Redis has said for the first time how things stand, the destination counts as held; while it is away, what it said last
counts, and a rate lets nothing through.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from contextlib import suppress

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.ledger import health
from relay.ledger.health import Health
from relay.ledger.redis_clock import RedisClock

_GRANT_SECONDS = 1.0  # that a grant is good for
_LOOK_SECONDS = 1.0
_SHORTEST = 0.02


class HoldAndThrottle:
    """The hold and the throttle of one courier; ``wake`` is called when it may go on, or must not."""

    def __init__(self, connection: Redis, destination: str, worker: str, clock: RedisClock) -> None:
        self._connection = connection
        self._name = destination
        self._worker = worker
        self._standing: Health | None = None
        self._clock = clock
        self._was_held = False
        self._tokens = 0
        self._good_until = 0.0  # monotonic
        self._spent = asyncio.Event()
        self._part: int | None = None  # of the connections; None: as many as are set
        self.wake: Callable[[], None] = lambda: None

    # --- asked before each copy -----------------------------------------------------------------------------------

    @property
    def lets_begin(self) -> bool:
        """Whether a copy may be begun now: neither barred nor waiting."""
        standing = self._standing
        if standing is None or standing.hold is not None or standing.rate:
            return not (self.is_barred or self.is_waiting)
        return self._part != 0

    @property
    def is_held(self) -> bool:
        """Whether an operator holds the destination, or nobody knows as yet."""
        standing = self._standing
        return standing is None or (standing.hold is not None and standing.is_held(self._clock.now()))

    @property
    def is_barred(self) -> bool:
        """Whether nothing is to be taken in hand at all: it is held, or others have all the connections."""
        return self.is_held or self._part == 0

    @property
    def is_waiting(self) -> bool:
        """Whether this second's copies have all been begun."""
        return bool(self._standing and self._standing.rate) and self._left() == 0

    @property
    def is_throttled(self) -> bool:
        """Whether an operator has bound the rate or the connections."""
        return bool(self._standing and (self._standing.rate or self._standing.connections))

    @property
    def most(self) -> float:
        """How many copies may begin within a second."""
        return self._standing.rate or math.inf if self._standing else 0.0

    def ask_now(self) -> None:
        """Ask Redis for more, where copies have to wait for it."""
        if self.is_waiting:
            self._spent.set()

    def begins(self) -> None:
        """Note that a copy is begun."""
        if self._tokens:
            self._tokens -= 1
            if not self._tokens:
                self._spent.set()

    def held_seconds(self, since: float, now: float) -> float:
        """Return for how long the destination was held between two times."""
        return self._standing.held_seconds(since, now) if self._standing else 0.0

    def _left(self) -> int:
        if time.monotonic() >= self._good_until:
            self._tokens = 0
        return self._tokens

    # --- kept up to date ------------------------------------------------------------------------------------------

    def note(self, standing: Health) -> None:
        """Take how things stand."""
        known, self._standing = self._standing, standing
        is_held, hold = self.is_held, standing.hold
        if is_held and not self._was_held and hold is not None:
            maillog.destination_held(self._name, hold.reason, hold.by, hold.until - self._clock.now())
        elif self._was_held and not is_held:
            maillog.destination_released(self._name, has_ended=hold is not None)
        self._was_held = is_held
        if known is None or is_held or (known.rate, known.connections) != (standing.rate, standing.connections):
            self._spent.set()
            self.wake()

    async def share(self, wanted: Callable[[], int], narrow: Callable[[int], None]) -> None:
        """Get this worker's share of a throttle; runs until cancelled.

        ``wanted`` says how many copies are to be begun, ``narrow`` takes how many connections there may be, 0 for as
        many as are set.
        """
        while True:
            standing = self._standing
            pause = _LOOK_SECONDS
            if standing is None or not (standing.rate or standing.connections):
                self._take_part(None, narrow)
            else:
                try:
                    pause = await self._ask(standing, wanted() if self.is_waiting else 0, narrow)
                except (RedisError, OSError) as error:
                    maillog.ledger_trouble("the throttle of a destination", error)
            self._spent.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._spent.wait()

    async def _ask(self, standing: Health, wanted: int, narrow: Callable[[int], None]) -> float:
        """Ask for copies and connections once; returns after how many seconds to ask again."""
        wanted = min(wanted, math.ceil(standing.rate))
        asked_at = time.monotonic()
        async with self._connection.pipeline(transaction=False) as pipe:
            health.ask_grant(pipe, self._name, self._worker, standing.rate, wanted)
            (result,) = await pipe.execute()
        count, place, workers = health.granted(result)
        if standing.connections:
            part = standing.connections // workers + (place <= standing.connections % workers) if place else 0
            self._take_part(part, narrow)
        else:
            self._take_part(None, narrow)
        if count:
            self._tokens, self._good_until = count, asked_at + _GRANT_SECONDS
            self.wake()
        elif wanted:
            return min(_LOOK_SECONDS, max(_SHORTEST, workers / standing.rate))
        return _LOOK_SECONDS

    def _take_part(self, part: int | None, narrow: Callable[[int], None]) -> None:
        if part != self._part:
            self._part = part
            narrow(part or 0)
            self.wake()
