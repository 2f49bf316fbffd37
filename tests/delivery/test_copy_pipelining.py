"""Transactions behind the dot of the one before, with a Postfix that is strict about who speaks when."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from relay.ledger import keys
from support import pipelined_copies
from support.ledger_contents import Contents
from support.postfix_instance import PostfixInstance

StartPostfix = Callable[[PostfixInstance], PostfixInstance]
STRICT = {
    f"smtpd_{stage}_restrictions": "reject_unauth_pipelining" for stage in ("client", "sender", "data", "end_of_data")
}


@pytest.mark.postfix
def test_postfix_takes_what_comes_behind_a_dot(
    redis_url: str, redis_client: redis.Redis, postfix: StartPostfix
) -> None:
    """A Postfix that rejects whoever pipelines where it must not takes all, once and whole."""
    store = postfix(PostfixInstance.store(**STRICT))
    pipelined_copies.deliver(Contents(redis_client, "new"), redis_url, store.port)
    assert not redis_client.zcard(keys.PENDING + "new")
    assert not redis_client.zcard(keys.FAILED + "new")
    assert pipelined_copies.numbers(store.wait_for(pipelined_copies.COUNT)) == list(range(pipelined_copies.COUNT))
    assert "improper command pipelining" not in store.log
