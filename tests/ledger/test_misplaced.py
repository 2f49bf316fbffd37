"""A key of another type than it should be stops nothing for longer than until the next sweep."""

from __future__ import annotations

import pytest
import redis

from relay.ledger import keys, misplaced
from support.ledger_contents import Contents, settings
from workers.upkeep.reconciler import verify
from workers.upkeep.sweep import Sweeper

# What else there is: one key for each message, group, minute, installation; who reads them takes a wrong type for none.
_MANY = {
    "PREFIX", "MESSAGE", "DIVERGED", "EXAMPLES", "WHOM", "SEALED", "IMPORTED", "MOVED", "FLOW", "FLOW_BASE", "ASIDE",
    "ASK", "ANSWER", "PAGE_SESSION", "PAGE_LINK",
}  # fmt: skip


def test_every_key_has_a_type() -> None:
    """A key that is added to the ledger is added to these, or is one of many."""
    known = {*misplaced._FIXED, *misplaced._OF_DESTINATION}
    named = {name: value for name, value in vars(keys).items() if name.isupper() and name not in _MANY}
    assert {name for name, value in named.items() if value not in known} == set()


def test_each_is_renamed(redis_client: redis.Redis) -> None:
    """Whatever stands in the way is kept under another name, and a sweep goes through; what is right stays."""
    ledger = Contents(redis_client, "new", "old")
    kept = ledger.pending("a@test", to=("old",))
    wanted = misplaced._FIXED | {prefix + "new": kind for prefix, kind in misplaced._OF_DESTINATION.items()}
    wanted |= misplaced._of_queue(redis_client, "new")
    for key, kind in wanted.items():
        redis_client.delete(key)
        if kind == "string":
            redis_client.lpush(key, "x")
        else:
            redis_client.set(key, "x")
    Sweeper(redis_client, settings(relay_destination_backups="new=new:25,old=old:25")).sweep()
    aside = {key.decode() for key in redis_client.scan_iter(match=keys.ASIDE + "*")}
    assert aside == {keys.ASIDE + key for key in wanted}
    assert redis_client.zscore(keys.PENDING + "old", kept) is not None
    assert redis_client.type(keys.DESTINATIONS) == b"hash"


def test_verify_renames_before_it_looks(redis_client: redis.Redis) -> None:
    """What keeps every command from its work is mended by the one that mends; --dry-run touches nothing."""
    Contents(redis_client, "new")
    redis_client.set(keys.PENDING + "new", "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        verify(redis_client, settings(relay_destination_backups="new=new:25"), pause=0, repair=False)
    report = verify(redis_client, settings(relay_destination_backups="new=new:25"), pause=0)
    assert [row.finding for row in report.findings if "type" in row.finding] == ["key of another type"]
    assert redis_client.type(keys.ASIDE + keys.PENDING + "new") == b"string"
