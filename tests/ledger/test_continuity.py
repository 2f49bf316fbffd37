"""A Redis that comes back empty, older or in part: it is noticed and said, and nothing accepted afterwards is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import redis

from relay.ledger import changes, continuity, keys, overview, registry
from relay.ledger.changes import Released, Staged
from relay.ledger.continuity import Continuity
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.redisio import embedded
from support import batches
from support.ledger_contents import Contents, settings
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until
from workers.upkeep.sweep import Sweeper

Make = Callable[..., Product]

SETTINGS = {
    "retry.first": "1",
    "retry.longest": "2",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "redis.timeout_seconds": "2",
}
A, B = (Destination(name=name, host="localhost", port=25) for name in ("a", "b"))


def _accept(client: redis.Redis, message_id: str, *names: str) -> None:
    """Stage and release a message, as a relay does whatever has become of the ledger."""
    envelope = Envelope(message_id, "a@test", (Recipient("b@test"),), 1.0, 3, destinations=names, promised=())
    with client.pipeline() as pipe:
        batches.stage(pipe, [Staged(message_id, Message(envelope, b"x\r\n").packed(), 2e9)])
        changes.release(pipe, [Released(message_id, names)])
        pipe.execute()


def _settle(client: redis.Redis, name: str, *ids: str) -> None:
    with client.pipeline() as pipe:
        changes.settle(pipe, name, ids)
        pipe.execute()


def _bodies(client: redis.Redis) -> set[str]:
    return {key.decode().removeprefix(keys.MESSAGE) for key in client.keys(keys.MESSAGE + "*")}


# Nothing is deleted that a list names -----------------------------------------------------------------------------

LOST: dict[str, Sequence[str]] = {
    "everything": ["FLUSHALL"],
    "this database": ["FLUSHDB"],
    "the definitions": ["DEL", keys.DESTINATIONS],
    "the index": ["DEL", keys.LISTS],
    "definitions and index": ["DEL", keys.DESTINATIONS, keys.LISTS],
    "one definition": ["HDEL", keys.DESTINATIONS, "b"],
    "counters and identity": ["DEL", keys.COUNTERS, keys.LEDGER],
}


@pytest.mark.parametrize(
    ("lost", "when"),
    [(lost, "before it is accepted") for lost in LOST]
    + [(lost, "while it waits") for lost, command in LOST.items() if not command[0].startswith("FLUSH")],
)
def test_the_first_to_deliver_leaves_the_body_to_the_others(redis_client: redis.Redis, lost: str, when: str) -> None:
    """Whatever the ledger has forgotten: a body goes when the last of its copies has."""
    known = Continuity([A, B])
    known.look(redis_client)
    if when == "before it is accepted":
        redis_client.execute_command(*LOST[lost])
    _accept(redis_client, "one", "a", "b")
    if when == "while it waits":
        redis_client.execute_command(*LOST[lost])
    _settle(redis_client, "a", "one")
    assert _bodies(redis_client) == {"one"}
    _settle(redis_client, "b", "one")
    known.look(redis_client)
    continuity.forget_kept(redis_client)
    assert _bodies(redis_client) == set()
    assert redis_client.exists(keys.KEPT) == 0


@pytest.mark.parametrize("change", ["settle", "drop pending", "drop failed", "purge", "discard", "move", "stow"])
def test_no_change_deletes_what_a_list_names_that_nobody_defines(redis_client: redis.Redis, change: str) -> None:
    """Each way to forget a copy asks all lists, also of a Redis that knows none of their destinations."""
    contents = Contents(redis_client, "a", "b")
    message_id = contents.pending(to=("a", "b"))
    if change == "stow" or change == "drop failed":
        contents.fail(message_id, to="a")
    redis_client.delete(keys.DESTINATIONS, keys.LISTS)
    record = redis_client.get(keys.MESSAGE + message_id)
    with redis_client.pipeline() as pipe:
        if change == "settle":
            changes.settle(pipe, "a", [message_id])
        elif change.startswith("drop"):
            changes.drop(pipe, "a", [message_id], pending=change == "drop pending")
        elif change == "purge":
            changes.purge(pipe, [message_id])
        elif change == "discard":
            pipe.zadd(keys.STAGED, {message_id: 1.0})
            changes.discard(pipe, [message_id])
        elif change == "move":
            changes.move(pipe, "a", "c", [changes.Move(message_id, "", None)])
        else:
            changes.stow(pipe, message_id, b"stub", "here")
        pipe.execute()
    assert redis_client.get(keys.MESSAGE + message_id) == record
    assert redis_client.zscore(keys.PENDING + "b", message_id) is not None


# Registration -----------------------------------------------------------------------------------------------------


def test_a_destination_that_only_a_list_names_is_known_again(redis_client: redis.Redis) -> None:
    """By what was known of it, by its name, or with port 0; what is no name of ours is kept and not defined."""
    for name in ("known", "old.example.com:2525", "[::1]:25", "nameless", "no name", "../x"):
        redis_client.zadd(keys.PENDING + name, {"id": 1.0})
    redis_client.zadd(keys.FAILED + "gone", {"id": 1.0})
    known = Destination(name="known", host="known.example.com", port=26, domains=("x.example",))
    found = continuity.register(redis_client, {"known": known.to_json()}, {"a": A.to_json()})
    assert found == ["[::1]:25", "gone", "known", "nameless", "old.example.com:2525"]
    defined = registry.destinations(redis_client)
    assert defined["known"] == known
    assert (defined["old.example.com:2525"].host, defined["old.example.com:2525"].port) == ("old.example.com", 2525)
    assert (defined["[::1]:25"].host, defined["[::1]:25"].port) == ("::1", 25)
    assert defined["gone"].port == defined["nameless"].port == continuity.NO_PORT
    assert defined["a"] == A
    assert {b"no name", b"../x", b"gone", b""} <= redis_client.smembers(keys.LISTS)
    assert continuity.register(redis_client, {}) == []


def test_a_sweep_judges_by_all_that_there_is(redis_client: redis.Redis) -> None:
    """The bodies of a destination that the ledger has forgotten are no orphans, and its copies get jobs."""
    contents = Contents(redis_client, "gone:25")
    old = contents.pending(to=("gone:25",), message_id="0000000000000000", age=30 * 86400)
    redis_client.delete(keys.DESTINATIONS, keys.LISTS)
    sweeper = Sweeper(redis_client, settings())
    sweeper.sweep(thorough=True)
    report = sweeper.sweep(thorough=True)
    assert contents.has_body(old)
    assert report.counts["body that nobody lists"] == 0
    assert list(contents.queued("gone:25").values()) == [[old]]


# Noticing ---------------------------------------------------------------------------------------------------------


def test_what_becomes_of_a_ledger_is_said_once(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emptied, older, replaced: by whoever looks first, and by nobody else; a ledger that only grows is no news."""
    said: list[str] = []
    monkeypatch.setattr("relay.maillog.notice", lambda _level, _text, **fields: said.append(fields.get("cause", "")))
    seers = [Continuity([A]) for _ in range(3)]

    def look() -> list[str]:
        said.clear()
        for seer in (*seers, *seers):
            seer.look(redis_client)
        return [cause for cause in said if cause]

    assert look() == []
    before = redis_client.dump(keys.LEDGER)
    assert look() == []
    redis_client.flushall()
    assert look() == ["emptied"]
    assert set(registry.destinations(redis_client)) == {"a"}
    assert overview.change(redis_client).cause == "emptied"
    redis_client.restore(keys.LEDGER, 0, before, replace=True)
    assert look() == ["replaced"]
    before = redis_client.dump(keys.LEDGER)
    for _ in range(3):
        assert look() == []
    redis_client.restore(keys.LEDGER, 0, before, replace=True)
    assert look() == ["older"]
    assert look() == []


def test_what_a_failover_may_take_back_is_no_loss(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """With redis.replicas: a count that no replica had was never known, and a worker's claims are no staged mail."""
    monkeypatch.setattr("relay.maillog.notice", lambda *_, **__: None)
    relays = {replicas: Continuity([A], replicas=replicas) for replicas in (0, 1)}  # this server has no replica
    for relay in relays.values():
        relay.look(redis_client)
    before = redis_client.dump(keys.LEDGER)
    for relay in 3 * list(relays.values()):
        relay.look(redis_client)
    redis_client.restore(keys.LEDGER, 0, before, replace=True)
    relays[1].look(redis_client)
    assert not overview.change(redis_client).cause
    relays[0].look(redis_client)  # as a worker does
    assert overview.change(redis_client).cause == "older"
    relays[1].look(redis_client)
    assert {replicas: relay.changes for replicas, relay in relays.items()} == {0: 1, 1: 0}
    redis_client.flushall()
    for relay in relays.values():
        relay.look(redis_client)
    assert {replicas: relay.changes for replicas, relay in relays.items()} == {0: 2, 1: 1}


def test_it_is_noticed_at_the_next_start(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state folder remembers the ledger, and what destinations were, also of those that have left the settings."""
    said: list[str] = []
    monkeypatch.setattr("relay.maillog.notice", lambda _level, _text, **fields: said.append(fields.get("cause", "")))
    Continuity([A, B], tmp_path).look(redis_client)
    Continuity([B], tmp_path).look(redis_client)
    assert said == []
    redis_client.flushall()
    redis_client.zadd(keys.FAILED + "a", {"id": 1.0})
    Continuity([B], tmp_path).look(redis_client)
    assert said[0] == "emptied"
    assert registry.destinations(redis_client) == {"a": A, "b": B}
    (tmp_path / "ledger.json").write_text("{")
    Continuity([B], tmp_path).look(redis_client)
    assert "emptied" not in said[1:]


# The product ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["everything", "definitions and index"])
@pytest.mark.timeout(120)
def test_mail_accepted_after_redis_was_emptied_reaches_every_backup(
    product: Make, primary: ScriptedServer, scripted: Callable[..., ScriptedServer], lost: str
) -> None:
    """The slower backup gets what the faster one has had; the loss is said in the log, /readyz and a metric."""
    quick, slow = scripted(), scripted()
    both = product(primary=primary.address, backups=[quick.address, slow.address], settings=SETTINGS)
    both.send("a@example.com", "b@example.com", data=b"Subject: before\r\n\r\n")
    quick.wait_for(1)
    slow.wait_for(1)
    slow.replies["MAIL"] = "451 4.3.2 not now"
    with redis.Redis.from_url(both.redis_url) as client:
        client.execute_command(*LOST[lost])
    for number in range(5):
        both.send("a@example.com", "b@example.com", data=b"Subject: %d\r\n\r\n" % number)
    quick.wait_for(6)
    wait_until(lambda: [row["pending"] for row in both.json("queue", "summary")].count(0) == 1, message="not settled")
    slow.replies.clear()
    slow.wait_for(6)
    assert next(m.header("Subject") for m in slow.messages) == "before"
    assert {m.header("Subject") for m in slow.messages[1:]} == set("01234")
    if lost == "everything":
        both.wait_for_log("the ledger in Redis is gone")
        status, text = both.get("/readyz")
        assert status == 200
        assert any("the ledger in Redis is gone" in warning for warning in json.loads(text)["warnings"])
        assert both.metric("smtpdup_ledger_changed_timestamp_seconds") > 0
        assert both.log.count("the ledger in Redis is gone") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("running", [True, False])
def test_an_older_state_explains_what_it_repeats(
    product: Make,
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    tmp_path: Path,
    running: bool,
) -> None:
    """A copy of which a restored state does not know that it was delivered has a line with its id.

    Its worker does not deliver it again; another one does, also when nobody was there to see the change.
    """
    server = redis_factory()
    up = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=SETTINGS)
    backup.replies["MAIL"] = "451 4.3.2 not now"
    up.send("a@example.com", "b@example.com", data=b"Subject: one\r\n\r\n")
    wait_until(lambda: up.summary()["retrying"], message="not deferred")
    up.stop()
    server.stop()
    data = embedded.folder(server.directory) / "appendonlydir"
    shutil.copytree(data, tmp_path / "older")
    server.start()
    backup.replies.clear()
    up.start()
    backup.wait_for(1)
    wait_until(lambda: up.summary()["pending"] == 0, message="not settled")
    up.send("a@example.com", "b@example.com", data=b"Subject: two\r\n\r\n")
    backup.wait_for(2)
    if not running:
        up.stop()
    server.kill()
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "older", data)
    server.start()
    if not running:
        up.start()
    told = "delivered before Redis lost that: not sent again" if running else "may repeat"
    wait_until(lambda: any(e.get("event") == told for e in up.events), 30, lambda: up.log[-4000:])
    if not running:
        backup.wait_for(3, timeout=30)
    wait_until(lambda: up.summary()["pending"] == 0, message="not settled again")
    assert [m.header("Subject") for m in backup.messages] == ["one", "two", "one"][: 2 if running else 3]
    first = next(e["id"] for e in up.events if e.get("event") == "accepted")
    assert [e["id"] for e in up.events if e.get("event") == told] == [first]
    up.wait_for_log("the ledger in Redis is older than it was")
