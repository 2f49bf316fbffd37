"""Transactions that succeed only when enough replicas have them (``redis.replicas``).

A transaction of a ConfirmedRedis waits for its replicas; too few of them raise TooFewReplicas, which like any
RedisError means "do not rely on it" and not "it was not done".
"""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis.asyncio.client import Pipeline as AsyncPipeline
from redis.exceptions import RedisError

PROBE = "smtpdup:probe"  # string that expires soon: shows whether Redis accepts writes

CONFIRM_SECONDS = 1.0


class TooFewReplicas(RedisError):
    """Too few replicas have a write: a failover may lose it."""


class ConfirmedRedis(redis.asyncio.Redis):
    """A client whose transactions succeed only when enough replicas have them."""

    replicas = 0
    patience = CONFIRM_SECONDS

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> AsyncPipeline:
        if not transaction:
            return super().pipeline(transaction, shard_hint)
        made = _ConfirmedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.replicas, made.patience = self.replicas, self.patience
        return made


class _ConfirmedPipeline(AsyncPipeline):
    """MULTI, then WAIT on the same connection: one more round trip for a whole group."""

    replicas = 0
    patience = CONFIRM_SECONDS

    async def _execute_transaction(self, connection: Any, commands: Any, raise_on_error: Any) -> list[Any]:
        # WAIT waits for the last write of this connection, and a repeated change may write nothing. After a write of
        # its own, WAIT covers everything before it, also the writes of other connections.
        mark: Any = (("SET", PROBE, "", "EX", 60), {})
        answers = await super()._execute_transaction(connection, [*commands, mark], raise_on_error)
        await connection.send_command("WAIT", self.replicas, round(self.patience * 1000))
        check(await connection.read_response(), self.replicas)
        return list(answers[:-1])


def confirmation(client: redis.asyncio.Redis) -> tuple[tuple[Any, ...], ...]:
    """Return the commands to send after writes outside a transaction; the last reply is for ``check``."""
    if not isinstance(client, ConfirmedRedis):
        return ()
    return ("SET", PROBE, "", "EX", 60), ("WAIT", client.replicas, round(client.patience * 1000))


def check(answer: object, replicas: int) -> None:
    """Check the reply to WAIT. Raises TooFewReplicas."""
    if isinstance(answer, Exception):
        raise answer
    if not isinstance(answer, int) or answer < replicas:
        raise TooFewReplicas(f"{answer} of {replicas} replicas have it")


def probe(pipe: Any) -> None:
    """Write the probe key."""
    pipe.set(PROBE, "", ex=60)
