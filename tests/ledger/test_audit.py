"""The audit: what operators did, in order, as text that is shown safely whatever Redis holds."""

from __future__ import annotations

import time

import pytest
import redis

from relay.ledger import audit, keys
from relay.ledger.audit import Act


def test_what_is_recorded_is_read_back_newest_first(redis_client: redis.Redis, capfd: pytest.CaptureFixture) -> None:
    """With who, where, why, and what it was before and is after; ``since`` bounds it; a page is no end."""
    begun = time.time()
    for n in range(1200):
        act = Act("queue drop", before=f"{n}", after="0", reason="spam", details={"destination": "new"}, who="alice")
        audit.add(redis_client, act)
    found = list(audit.acts(redis_client, begun - 10))
    assert [act.before for act in found] == [str(n) for n in reversed(range(1200))]
    assert {(act.who, act.command, act.reason, act.details["destination"]) for act in found} == {
        ("alice", "queue drop", "spam", "new")
    }
    assert all(abs(act.at - begun) < 60 for act in found)
    assert not list(audit.acts(redis_client, time.time() + 60))


def test_an_act_is_a_line_in_the_log(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Redis cannot take it: then the caller hears of that."""
    said: list[dict[str, object]] = []
    monkeypatch.setattr("relay.maillog.notice", lambda level, text, **fields: said.append({"event": text, **fields}))
    monkeypatch.setenv("SUDO_USER", "bob")
    redis_client.set(keys.AUDIT, "no stream")
    with pytest.raises(redis.RedisError):
        audit.record(redis_client, Act("promote new", before="old", after="new", reason="Friday"))
    assert said == [
        {
            "event": "operator",
            "command": "promote new",
            "who": "bob",
            "before": "old",
            "after": "new",
            "reason": "Friday",
        }
    ]


def test_what_redis_holds_is_data(redis_client: redis.Redis) -> None:
    """Foreign, damaged and hostile entries are shown escaped, cut or empty, and hide no other."""
    redis_client.xadd(keys.AUDIT, {"command": b"a\x1b[2J\xff", "details": b"[1]"}, id="1-1")
    redis_client.xadd(keys.AUDIT, {"foreign": "x"}, id="2-1")
    audit.add(redis_client, Act("hold", reason="x" * 5000, details={"n": "y" * 5000}, who="\n"))
    hold, foreign, hostile = audit.acts(redis_client)
    assert len(hold.reason) == len(hold.details["n"]) == 1000
    assert hold.who == "\\n"
    assert (foreign.command, foreign.at) == ("", 0.002)
    assert hostile.command.isprintable()
    assert hostile.details == {}


def test_it_is_bounded(redis_client: redis.Redis) -> None:
    """Ten thousand acts and a little, however many there were."""
    pipe = redis_client.pipeline(transaction=False)
    for _ in range(11_000):
        audit.add(pipe, Act("hold", who="x"))
    pipe.execute()
    assert 10_000 <= redis_client.xlen(keys.AUDIT) <= 10_200
