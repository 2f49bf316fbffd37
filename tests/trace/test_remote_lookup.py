"""A look-up over several hosts: one life of what two hosts know; who does not answer is named, within three seconds."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from relay.ledger import hosts, keys
from relay.mail.reply import Reply
from relay.stopping import StopEvent
from relay.trace import events, remote_lookup
from relay.trace.life import MessageLife
from relay.trace.lookup import Query, Unseen, find
from relay.trace.recipients import SeenRecipients
from relay.trace.remote_lookup import PATIENCE, OtherHosts, keep_answering
from support.traced import Traced, delivered

HERE, THERE = "a /var/lib/x", "b /var/lib/x"


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Traced]:
    found = Traced(tmp_path / "here", role="relay")
    yield found
    found.close()


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Traced]:
    found = Traced(tmp_path / "there", role="workers")
    yield found
    found.close()


@pytest.fixture
def answering(redis_client: redis.Redis, redis_url: str, there: Traced) -> Iterator[None]:
    """The other host's housekeeping."""
    stop = StopEvent()
    announce(redis_client, HERE, "relay")
    announce(redis_client, THERE, "workers")

    def connect() -> redis.Redis:
        return redis.Redis.from_url(redis_url)

    thread = threading.Thread(target=keep_answering, args=(connect, there.folder, THERE, stop))
    thread.start()
    with ExitStack() as ends:
        ends.callback(thread.join)
        ends.callback(stop.set)
        yield


def announce(client: redis.Redis, place: str, role: str) -> None:
    seconds, microseconds = client.time()
    hosts.tell(client, place, role, 1, 0, 0.0, seconds + microseconds / 1e6)


def look(
    client: redis.Redis, here: Traced, *what: str, unseen: Unseen | None = None, **rest: object
) -> list[MessageLife]:
    unseen = Unseen() if unseen is None else unseen
    others = OtherHosts(client, HERE, unseen)
    query = Query.of(what, **rest)
    return list(find(query, here.folder, connection=client, others=others, unseen=unseen))


@pytest.mark.usefixtures("answering")
def test_one_life_of_two_hosts(redis_client: redis.Redis, here: Traced, there: Traced) -> None:
    """Received here, delivered and refused there: found by the words of either half, with its whole story."""
    mine, other = here.received(), here.received("eve@e.example", ["bob@b.example"], message_id="<2@e.example>")
    here.write(mine, other)
    there.write(delivered(mine[1]))
    said = Reply.of(550, "5.1.1 unknown")
    there.write(events.tried(other[1], "new", 1, 0.1, [(events.FAILED, 1, ["bob@b.example"], said)]))
    redis_client.zadd(keys.FAILED + "new", {other[1]: there.now})
    for word in ("alice@a.example", "NEW77abc", mine[1], "<1@a.example>"):
        (life,) = look(redis_client, here, word)
        assert (life.id, life.sender, life.status) == (mine[1], "alice@a.example", "delivered"), word
    assert [life.id for life in look(redis_client, here, "to:bob@b.example", status="failed")] == [other[1]]
    assert [life.id for life in look(redis_client, here, status="failed")] == [other[1]]
    # From the other side, where nothing was received.
    assert {life.id for life in look(redis_client, here, "@b.example")} == {mine[1], other[1]}


@pytest.mark.usefixtures("answering")
def test_the_newest_of_all_hosts(redis_client: redis.Redis, here: Traced, there: Traced) -> None:
    """--limit counts over all."""
    ids = []
    for n in range(10):
        host = (here, there)[n % 2]
        here.now = there.now = here.now + 1
        wire = host.received()
        host.write(wire)
        ids.append(wire[1])
    assert [life.id for life in look(redis_client, here, "bob@b.example", limit=3)] == ids[::-1][:3]


def test_who_does_not_answer_is_named(redis_client: redis.Redis, here: Traced) -> None:
    """Within three seconds, and asked once; what this host knows is there."""
    announce(redis_client, THERE, "workers")
    here.write(mine := here.received())
    unseen = Unseen()
    begun = time.monotonic()
    (life,) = look(redis_client, here, "bob@b.example", unseen=unseen)
    assert life.id == mine[1]
    assert PATIENCE <= time.monotonic() - begun < 4 * PATIENCE
    assert unseen.silent == [next(h.host for h in hosts.read(redis_client) if h.place == THERE)]
    assert 0 < redis_client.ttl(keys.ASK + THERE) <= 10


@pytest.mark.usefixtures("answering")
@pytest.mark.parametrize("question", [b"", b"{", b"[]", b'{"asked":7,"reply":"a"}', b'{"asked":{},"reply":"a"}',
                                      b'{"asked":{"ids":["../x"]},"reply":"a"}',
                                      b'{"asked":{"find":[["id","Z","x"]],"since":0},"reply":"../a"}',
                                      b'{"asked":{"find":7,"since":"x","status":1},"reply":"b"}'])  # fmt: skip
def test_a_question_that_makes_no_sense(
    redis_client: redis.Redis, here: Traced, there: Traced, question: bytes
) -> None:
    """The host goes on answering."""
    redis_client.rpush(keys.ASK + THERE, question)
    there.write(mine := there.received())
    unseen = Unseen()
    assert [life.id for life in look(redis_client, here, "bob@b.example", unseen=unseen)] == [mine[1]]
    assert unseen.silent == []


def test_an_answer_that_makes_no_sense(redis_client: redis.Redis, here: Traced) -> None:
    """It is no answer: what another host says is data."""
    announce(redis_client, THERE, "workers")
    here.write(mine := here.received())
    hostile: list[Callable[[str], bytes]] = [
        lambda place: b"\xff{",
        lambda place: json.dumps({"place": place, "part": 7}).encode(),
        lambda place: json.dumps({"place": place, "part": {"events": [[1], None, ["m"]], "damaged": 3}}).encode(),
        lambda place: json.dumps({"place": ["x"], "part": {}}).encode(),
        lambda place: json.dumps({"place": place, "end": True}).encode(),
    ]

    def answer() -> None:
        with redis.Redis(connection_pool=redis_client.connection_pool) as client:
            for _ in range(2):  # what is looked for, and what is known of what was found
                found = client.blpop([keys.ASK + THERE], timeout=20)
                reply_to = json.loads(found[1])["reply"]
                for make in hostile:
                    client.rpush(keys.ANSWER + reply_to, make(THERE))

    thread = threading.Thread(target=answer)
    thread.start()
    unseen = Unseen()
    assert [life.id for life in look(redis_client, here, "bob@b.example", unseen=unseen)] == [mine[1]]
    thread.join()
    assert unseen.silent == []


@pytest.mark.usefixtures("answering")
def test_the_recipients_of_all_hosts(redis_client: redis.Redis, there: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, as they are read; of those since a moment."""
    monkeypatch.setattr(remote_lookup, "_READ_AT_ONCE", 2)
    there.write(there.received(recipients=["old@b.example"]))
    there.now += 7200
    unknown = [("gone@b.example", Reply.of(550, "5.1.1 unknown"), False)]
    there.write(*(there.received(recipients=[f"u{n}@b.example"], refused=unknown) for n in range(5)))
    found, unseen = SeenRecipients(), Unseen()
    OtherHosts(redis_client, HERE, unseen).recipients(there.now - 60, found)
    assert set(found.accepted) == {f"u{n}@b.example" for n in range(5)}
    assert (list(found.refused), unseen.silent) == (["gone@b.example"], [])


def test_recipients_of_a_host_that_does_not_answer(redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named; so is one whose version does not know what it is asked."""
    announce(redis_client, THERE, "workers")
    monkeypatch.setattr(remote_lookup, "_READING_PATIENCE", 0.1)
    unseen = Unseen()
    OtherHosts(redis_client, HERE, unseen).recipients(0.0, SeenRecipients())
    assert len(unseen.silent) == 1
    assert list(remote_lookup._answer({"recipients": "x"}, Path("nowhere"))) == []
