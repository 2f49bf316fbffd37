"""The ledger's scripts: a change affects only messages in the expected state."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import pytest
import redis

from relay.ledger import changes, copy_state, keys, queries
from relay.ledger.changes import Staged
from relay.ledger.scripts import script
from support import batches
from support.ledger_contents import Contents


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new", "other")


def _settle(contents: Contents, ids: Sequence[str], to: str = "new") -> int:
    with contents.connection.pipeline(transaction=True) as pipe:
        changes.settle(pipe, to, ids)
        return int(pipe.execute()[0])


def test_a_settled_copy_leaves_nothing_behind(contents: Contents) -> None:
    """Neither the body, nor a lease, nor its history outlives the last copy."""
    message_id = contents.pending()
    job = contents.defer(message_id)
    assert [claim.id for claim in contents.claim(job, message_id)] == [message_id]
    assert _settle(contents, [message_id]) == 1
    left = {key.decode() for key in contents.connection.keys("smtpdup:*")}
    assert left == {keys.DESTINATIONS, keys.LISTS, keys.LEDGER, keys.COUNTERS}
    assert contents.connection.hget(keys.COUNTERS, "delivered:new") == b"1"


@pytest.mark.parametrize("elsewhere", ["pending", "failed", "failed here"])
def test_a_body_stays_while_somebody_wants_it(contents: Contents, elsewhere: str) -> None:
    """A copy that waits or failed at another destination, or failed here for other recipients, needs the body."""
    message_id = contents.pending("a@test", "b@test", to=("new", "other"))
    if elsewhere == "failed":
        contents.fail(message_id, to="other")
    elif elsewhere == "failed here":
        contents.fail(message_id, owed=(0,), remains=copy_state.CopyState(owed=(1,)))
        assert _settle(contents, [message_id], "other") == 1
    assert _settle(contents, [message_id]) == 1
    assert contents.has_body(message_id)


def test_settling_again_changes_nothing(contents: Contents) -> None:
    """A repetition counts nothing and takes nothing, whatever has become of the message."""
    message_id = contents.pending()
    assert _settle(contents, [message_id]) == 1
    assert _settle(contents, [message_id]) == 0
    again = contents.staged(message_id=message_id)
    assert _settle(contents, [again]) == 0
    assert contents.has_body(again)
    assert contents.connection.hget(keys.COUNTERS, "delivered:new") == b"1"


@pytest.mark.parametrize("state", ["staged", "uncertain"])
def test_what_is_not_pending_yet_keeps_its_body_beside_what_is(contents: Contents, state: str) -> None:
    """A failover may make a settled copy's message staged again; settled once more with others, it is not lost."""
    early, delivered = contents.staged(), contents.pending()
    if state == "uncertain":
        with contents.connection.pipeline(transaction=True) as pipe:
            changes.hold(pipe, [changes.Held(early, "", 60.0)])
            assert pipe.execute() == [1]
    assert _settle(contents, [early, delivered]) == 1
    assert contents.has_body(early)
    assert not contents.has_body(delivered)


def test_thousands_are_settled_at_once(contents: Contents) -> None:
    """One call takes as many as Lua has room for arguments of a function."""
    ids = [f"id{n}" for n in range(7000)]
    contents.connection.zadd(keys.PENDING + "new", dict.fromkeys(ids, 1.0))
    contents.connection.mset({keys.MESSAGE + i: b"body" for i in ids})
    assert _settle(contents, [*ids, "unknown"]) == 7000
    assert contents.connection.exists(keys.PENDING + "new", *(keys.MESSAGE + i for i in ids)) == 0


@pytest.mark.parametrize("count", [1, 1001, 9000])
def test_however_many_are_staged_at_once(contents: Contents, count: int) -> None:
    """Each is listed with its own deadline, and has its own record."""
    messages = [Staged(f"id{n}", (b"record %d" % n,), 1e9 + n) for n in range(count)]
    with contents.connection.pipeline(transaction=True) as pipe:
        batches.stage(pipe, messages)
        assert pipe.execute() == [count, True]
    listed = contents.connection.zrange(keys.STAGED, 0, -1, withscores=True)
    assert listed == [(f"id{n}".encode(), 1e9 + n) for n in range(count)]
    written = contents.connection.mget(keys.MESSAGE + m.id for m in messages)
    assert written == [m.record[0] for m in messages]


def test_what_redis_gets_of_a_script_is_numbered_as_its_file() -> None:
    """Comments and indentation are not sent, and a line that an error names is found in the file."""
    written = resources.files("relay.ledger").joinpath("lua", "settle.lua").read_text(encoding="utf-8").splitlines()
    first, *sent = script("settle", without="turned").split("\n")
    assert first.startswith("local function destinations()")  # what several scripts share takes a comment's place
    sent = ["", *sent]
    assert [line.strip() for line in written if not line.lstrip().startswith("--")] == [line for line in sent if line]
    assert all(sent[n] in ("", line.strip()) for n, line in enumerate(written))


@pytest.mark.parametrize("protocol", [2, 3])
def test_pages_hold_everything_once(redis_url: str, protocol: int) -> None:
    """In order of time, up to a time, whichever protocol is spoken and however many have the same time."""
    with redis.Redis.from_url(redis_url, protocol=protocol) as connection:
        connection.zadd("some", {f"{n:02}": 1700000000.123456 + n // 7 for n in range(60)})
        found = list(queries.pages(connection, "some", until=1700000005.2, size=4))
    assert [pair for page in found for pair in page] == [(f"{n:02}", 1700000000.123456 + n // 7) for n in range(42)]
    assert all(len(page) <= 11 for page in found)


@pytest.mark.parametrize("end", ["its lease has run out", "it is known to be dead"])
def test_a_claim_names_the_worker_that_had_the_copy_before(contents: Contents, end: str) -> None:
    """Whoever claims what another had in hand is told, also when the answer to the claim is lost and it asks again."""
    message_id, other = contents.pending(), contents.pending()
    contents.claim("job", message_id, worker="first", lease=0 if "lease" in end else 60)
    if end == "it is known to be dead":
        with contents.connection.pipeline() as pipe:
            changes.release_leases(pipe, "new", "another")
            changes.release_leases(pipe, "new", "first")
            assert pipe.execute() == [[], [message_id.encode()]]
    for _ in range(2):
        claims = contents.claim("job", message_id, other, worker="second")
        assert {claim.id: claim.before for claim in claims} == {message_id: "first", other: ""}
    with contents.connection.pipeline() as pipe:
        changes.release_leases(pipe, "new", "second")
        pipe.execute()
    assert [c.before for c in contents.claim("job", message_id, other, worker="third")] == ["second", "second"]


@pytest.mark.parametrize("how", ["given back untried", "deferred", "failed and retried"])
def test_a_copy_with_an_outcome_was_in_nobodys_hand(contents: Contents, how: str) -> None:
    """What a worker said of a copy is known: the next one that claims it repeats nothing."""
    message_id = contents.pending()
    contents.claim("job", message_id, worker="first")
    job = "job"
    if how == "deferred":
        job = contents.defer(message_id)
    elif how == "given back untried":
        with contents.connection.pipeline() as pipe:
            changes.unlease(pipe, "new", "first", [message_id])
            pipe.execute()
    else:
        job = contents.fail(message_id).job
    assert [claim.before for claim in contents.claim(job, message_id, worker="second")] == [""]


def test_only_a_workers_own_leases_are_given_back(contents: Contents) -> None:
    """A change without an answer is repeated: meanwhile another worker may have the copy in hand."""
    message_id = contents.pending()
    with contents.connection.pipeline() as pipe:
        contents.claim("job", message_id, worker="first")
        for _ in range(2):
            changes.unlease(pipe, "new", "first", [message_id])
            assert pipe.execute()[0] in {0, 1}
            contents.claim("job", message_id, worker="second")
    assert contents.connection.hget(keys.HOLDERS + "new", message_id) == b"second"
    assert contents.claim("job", message_id, worker="third") == []
