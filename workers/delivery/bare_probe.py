"""Looks by a connection alone whether a server that is held, and was away, is back: whoever holds it sees that."""

from __future__ import annotations

import asyncio

from relay.breaker import Breaker
from relay.client.errors import ClientError
from relay.client.pool import Pool, PoolExhausted
from workers.delivery.gate import Gate

_LOOK_SECONDS = 0.5


async def keep_looking(gate: Gate, pool: Pool, breaker: Breaker) -> None:
    """Connect whenever such a probe is due; runs until cancelled."""
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        if gate.is_bare_probe_due:
            try:
                pool.give_back(await pool.lease(fresh=True))
            except PoolExhausted:
                continue
            except ClientError as error:
                breaker.opens(str(error))
            else:
                breaker.works()
