"""What the ledger adds to a batch of its own, added to a pipeline of redis-py instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from relay.ledger import changes
from relay.ledger.changes import Staged
from relay.redisio.pipeline import CommandBatch


class _Batch:
    """Stands for a CommandBatch whose commands go into a pipeline."""

    is_large = False

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def transaction(self, commands: Sequence[Sequence[Any]]) -> None:
        for command in commands:
            self._pipe.execute_command(*command)


def stage(pipe: Any, messages: Sequence[Staged]) -> None:
    """Stage messages by a pipeline that is a transaction: two replies, that of ZADD and that of MSET."""
    changes.stage(cast("CommandBatch", _Batch(pipe)), messages)
