"""Redis's clock as one process knows it: the time that all hosts share, kept by the monotonic clock between answers.

Deadlines, leases, schedules and ages are by Redis's clock. What this host's own clock says, or that it is set (an NTP
step, a virtual machine that goes on), moves none of them. That Redis's clock is set shows against the monotonic one;
a failover to a server whose clock differs looks the same. Until Redis has said its time, it is this host's.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from relay.batches import batched
from relay.ledger import keys
from relay.mail.stored import LATEST, figure

_TOLERANCE = 1.0  # seconds: a clock that is slewed is not set
_REMEMBERED = 100  # steps
_PAGE = 1000
_LOOKED = "looked"  # field of the ledger's hash


class _Leap(NamedTuple):
    """The clock was set forward, from that time, by so many seconds, which did not pass."""

    start: float
    seconds: float


class RedisClock:
    """Redis's clock. ``monotonic`` and ``wall`` are this host's."""

    def __init__(
        self, *, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._monotonic = monotonic
        self._ahead = wall() - monotonic()
        self._bounds = (-math.inf, math.inf)  # between which that is for certain, by the answers until now
        self._leaps: deque[_Leap] = deque(maxlen=_REMEMBERED)

    def now(self) -> float:
        """Return the time, seconds since the epoch."""
        return self._monotonic() + self._ahead

    def hear(self, said: float, asked_at: float) -> float:
        """Take Redis's answer to a question that was asked at that monotonic time.

        Returns by how many seconds its clock has been set since the answer before, 0 when it has not.
        """
        answered_at = self._monotonic()
        (least, most), (low, high) = self._bounds, (said - answered_at, said - asked_at)
        gap = max(low - most, least - high)  # what no slowness of the answers explains
        # A slow answer tells less than a prompt one before it.
        self._bounds = (low, high) if gap > 0 else (max(low, least), min(high, most))
        ahead = sum(self._bounds) / 2
        step = ahead - self._ahead if gap > _TOLERANCE else 0.0
        if step:
            self._note(answered_at + self._ahead, step)
        self._ahead = ahead
        return step

    def ask(self, connection: Any, last: float = 0.0) -> float:
        """Ask Redis. Returns what ``hear`` does. Raises RedisError.

        ``last`` is the time at which somebody of ours has last looked at this clock, for the first time that we do:
        what lies between is not known to have passed.
        """
        is_first = self._bounds[1] == math.inf
        asked_at = self._monotonic()
        step = self.hear(time_of(connection.time()), asked_at)
        if not (is_first and last):
            return step
        since = self.now() - last
        if since > 0:
            self._note(last, since)
        return since if since < -_TOLERANCE else 0.0

    def _note(self, start: float, step: float) -> None:
        """Remember a step forward; one back undoes the last of those, as far as it goes."""
        while step < 0 and self._leaps:
            start, length = self._leaps.pop()
            step += length
        if step > 0:
            self._leaps.append(_Leap(start, step))

    def age(self, at: float) -> float:
        """Return how many seconds ago that was, without those that did not pass."""
        age = self.now() - at
        if self._leaps:
            age -= sum(leap.seconds for leap in self._leaps if at <= leap.start)
        return max(0.0, age)

    def ago(self, seconds: float) -> float:
        """Return the time from which so many seconds have passed."""
        at = self.now() - seconds
        for start, length in reversed(self._leaps):
            if at < start + length:
                at -= length
        return at


def time_of(answer: Sequence[Any]) -> float:
    """Read the answer to TIME."""
    return int(answer[0]) + int(answer[1]) / 1e6


def last_look(connection: Any) -> float:
    """Return when a sweep has last looked at Redis's clock, by that clock; 0 where none has. Raises RedisError."""
    return figure(connection.hget(keys.LEDGER, _LOOKED), LATEST)


def note_look(connection: Any, now: float) -> None:
    """Note that this is the time, for whoever starts next. Raises RedisError."""
    connection.hset(keys.LEDGER, _LOOKED, f"{now:.3f}")


def pull_in(connection: Any, key: str, clock: float, *, by: float = 0.0, most: float) -> int:
    """Bring the times of a list that lie ahead of ``clock`` nearer: by so many seconds, and to ``most`` ahead at most.

    For what was written before Redis's clock was set back. Returns how many. Raises RedisError.
    """
    low = clock if by else clock + most
    found = dict(connection.zrangebyscore(key, f"({low:.6f}", "+inf", withscores=True))
    nearer = [(member, max(clock, min(at - by, clock + most))) for member, at in found.items()]
    for page in batched(nearer, _PAGE):
        connection.zadd(key, dict(page), xx=True, lt=True)  # what has left meanwhile stays gone
    return len(nearer)


def shorten(connection: Any, keys: Sequence[str], most: int) -> None:
    """Let keys that end by themselves live for ``most`` seconds at most, as they were meant to. Raises RedisError."""
    with connection.pipeline(transaction=False) as pipe:
        for key in keys:
            pipe.ttl(key)
        lives = pipe.execute()
        for key, left in zip(keys, lives, strict=True):
            if left > most or left == -1:  # -1: it would never end
                pipe.expire(key, most)
        pipe.execute()
