"""Room in Redis for what was spooled: who may have more copies there while memory is short.

Up to 60 % of ``maxmemory`` everybody may. Beyond that, a backup that does not take its copies would keep Redis full and
everybody else's copies on disk. So the last part is for those that do take them: few of their copies are waiting there,
and the next few come in when these are gone. What a backup has deferred (it lives, but says "later") does not count
as waiting, yet has to leave some room to those that say "yes". The others' copies stay on disk, where there is more.
"""

from __future__ import annotations

from collections.abc import Iterable

from redis.asyncio import Redis

from relay.ledger import keys
from relay.ledger.monitor import Monitor

_EVERYBODY = 0.75  # of maxmemory: up to where copies may come in while it is under 60 %
_DEFERRING = 0.80
_TAKING = 0.85
_RESERVE = 0.10  # what those that take theirs share
_MOST = 1000  # copies of one backup


class Admission:
    """Asks the ledger, since every host's relays fill the same memory."""

    def __init__(self, connection: Redis, watch: Monitor) -> None:
        self._connection = connection
        self._watch = watch

    async def levels(self, destinations: Iterable[str], octets: int) -> dict[str, float]:
        """Return up to which part of maxmemory copies of so many octets may come in, for each backup that may have any.

        Raises RedisError.
        """
        names = sorted(destinations)
        if self._watch.may_import():
            return dict.fromkeys([*names, ""], _EVERYBODY)  # and what is due nowhere as yet
        if not self._watch.is_calm or not names or not await self._watch.look():
            return {}  # what came in a moment ago may have gone out again: hence another look
        share = self._watch.copies(_RESERVE / (len(names) + 1), octets)
        few = max(1, min(_MOST, share))
        async with self._connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zcard(keys.PENDING + name)
                pipe.hlen(keys.OWN + name)
            counts = await pipe.execute()
        found: dict[str, float] = {}
        for name, pending, tried in zip(names, counts[::2], counts[1::2], strict=True):
            if pending < few:
                found[name] = _TAKING
            elif pending - tried < few:
                found[name] = _DEFERRING
        return found
