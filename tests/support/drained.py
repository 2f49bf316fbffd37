"""Whether a product has nothing under way any more."""

from __future__ import annotations

import time
from contextlib import suppress

import redis

from relay.config import loader
from relay.ledger import keys, overview
from relay.spool import writer
from support.product import Product
from workers.upkeep.reconciler import verify
from workers.upkeep.sweep import Sweeper


def is_drained(product: Product) -> bool:
    """Say whether nothing is under way; sweeps first, as the reconciler does once a minute."""
    settings = loader.load(environ=product.environment, directories=())
    with suppress(redis.RedisError), redis.Redis.from_url(product.redis_url) as client:
        sweeper = Sweeper(client, settings)
        for _ in range(4):  # a worker that begins or ends just now seems dead, for which the reconciler waits 20 s
            sweeper.sweep(repair=False, thorough=False)
            if not sweeper.misses_workers:
                break
            time.sleep(0.25)
        verify(client, settings, pause=0.5)
        left = writer.summary(product.state_dir / "spool").messages + client.zcard(keys.UNCERTAIN)
        return not left and all(row.pending == 0 for row in overview.summary(client))
    return False
