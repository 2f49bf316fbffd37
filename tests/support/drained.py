"""Whether a product has nothing under way any more."""

from __future__ import annotations

from contextlib import suppress

import redis

from relay.config import loader
from relay.ledger import keys, overview
from relay.spool import writer
from support.product import Product
from workers.upkeep.reconciler import verify


def is_drained(product: Product) -> bool:
    """Say whether nothing is under way; sweeps first, as the reconciler does once a minute."""
    with suppress(redis.RedisError), redis.Redis.from_url(product.redis_url) as client:
        verify(client, loader.load(environ=product.environment, directories=()), pause=0.5)
        left = writer.summary(product.state_dir / "spool").messages + client.zcard(keys.UNCERTAIN)
        return not left and all(row.pending == 0 for row in overview.summary(client))
    return False
