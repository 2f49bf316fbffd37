"""Room in Redis for spooled copies: which backups may get more copies there while memory is short.

While less than 60 % of ``maxmemory`` is used, all may. Beyond that, a backup that does not accept its copies would keep
Redis full and the copies of all others on disk. So the rest is for backups that accept theirs: only a few of their
copies are in Redis at once, and the next few follow when these are delivered. Copies that a backup has deferred do not
count as waiting, but such a backup gets a little less room. The copies of the other backups stay on disk.
"""

from __future__ import annotations

from collections.abc import Iterable

from redis.asyncio import Redis

from relay.ledger import keys
from relay.ledger.monitor import Monitor

_EVERYBODY = 0.75  # of maxmemory: up to where copies may come in while it is under 60 %
_DEFERRING = 0.80
_TAKING = 0.85
_RESERVE = 0.10  # the part that the accepting backups share
_MOST = 1000  # copies of one backup


class Admission:
    """Decides by the ledger, since the relays of all hosts fill the same memory."""

    def __init__(self, connection: Redis, watch: Monitor) -> None:
        self._connection = connection
        self._watch = watch

    async def levels(self, destinations: Iterable[str], octets: int) -> dict[str, float]:
        """Return for each backup that may get copies of this size: up to which part of maxmemory they may be imported.

        Raises RedisError.
        """
        names = sorted(destinations)
        if self._watch.may_import():
            return dict.fromkeys([*names, ""], _EVERYBODY)  # "": messages that are not due at any backup yet
        if not self._watch.is_calm or not names or not await self._watch.look():
            return {}  # the look refreshes the numbers: copies imported a moment ago may be delivered by now
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
