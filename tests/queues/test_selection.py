"""One filter for both lists: each condition, several together, and how much is looked at."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from relay.ledger import changes, keys
from relay.ledger.copy_state import CopyState
from relay.ledger.queries import UnknownDestination, UnknownId
from relay.mail import encryption
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from support import listed_copies
from support.ledger_contents import Contents
from workers.queues import backlog, failed, selection
from workers.queues.selection import FAILED, WAITING, Attempts, Filter, Which

HOUR = 3600.0


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new", "other")


def put(
    contents: Contents,
    which: Which,
    message_id: str,
    *,
    to: str = "new",
    sender: str = "from@a.test",
    recipients: tuple[str, ...] = ("to@b.test",),
    owed: tuple[int, ...] | None = None,
    client: str = "192.0.2.1",
    size: int = 100,
    age: float = 60.0,
    attempts: int = 1,
    reply: str = "",
    group: str = "",
) -> str:
    """Put one copy into a list, as it is after so many attempts; it is as old in the list as its message is."""
    at = changes.now(contents.connection) - age
    envelope = Envelope(
        message_id, sender, tuple(map(Recipient, recipients)), at, size, client_address=client, destinations=(to,)
    )
    body = b"x" * (size - 2) + b"\r\n"
    contents.connection.set(keys.MESSAGE + message_id, Message(envelope, body).pack())
    contents.connection.zadd(which.scores + to, {message_id: at})
    if reply:
        open_groups = ((group, (0,)),) if group else ()
        state = replace(CopyState("a-job", owed=owed, open=open_groups).tried(at, reply), attempts=attempts)
        contents.connection.hset(which.states + to, message_id, state.to_wire())
    return message_id


def id_of(name: str) -> str:
    return name.rjust(16, "0")


def found(contents: Contents, which: Which, **conditions: object) -> list[str]:
    chosen = Filter(**conditions)
    return [c.id.lstrip("0") for page in selection.select(contents.connection, which, chosen) for c in page.found]


CONDITIONS = [
    ({}, "abcdefg"),
    ({"destination": "other"}, "g"),
    ({"sender": "FROM@a.test"}, "aceg"),
    ({"sender": "@A.TEST"}, "acdeg"),
    ({"sender": "<>"}, "b"),
    ({"recipient": "second@c.test"}, "c"),
    ({"recipient": "@b.test"}, "abdefg"),
    ({"domain": "C.test"}, "c"),
    ({"domain": "test"}, ""),
    ({"client": (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32"))}, "de"),
    ({"reply": "No Such"}, "ab"),
    ({"reply": ".*"}, ""),
    ({"code": "550"}, "abc"),
    ({"code": "5xx"}, "abcd"),
    ({"code": "4"}, "e"),
    ({"code": "5.1.1"}, "ab"),
    ({"code": "5.1.10"}, "c"),
    ({"attempts": Attempts(">", 3)}, "e"),
    ({"attempts": Attempts("<=", 2)}, "abcdfg"),
    ({"attempts": Attempts("=", 5)}, "e"),
    ({"older": HOUR}, "ab"),
    ({"newer": HOUR}, "cdefg"),
    ({"older": HOUR, "newer": 3 * HOUR}, "b"),
    ({"larger": 1000}, "d"),
    ({"group": "0123456789ab"}, "a"),
    ({"group": "r0123456789ab"}, "a"),
    ({"group": "d0123456789ab"}, ""),
    ({"code": "550", "sender": "@a.test"}, "ac"),
    ({"sender": "@a.test", "code": "550", "domain": "b.test", "older": HOUR}, "a"),
    ({"ids": (id_of("c"), id_of("a")), "code": "550"}, "ca"),
    ({"limit": 2}, "ab"),
    ({"limit": 2, "sender": "@a.test"}, "ac"),
    ({"ids": (id_of("g"), id_of("a")), "destination": "other", "sender": "nobody@a.test"}, None),
]


@pytest.mark.parametrize("which", [WAITING, FAILED], ids=["waiting", "failed"])
@pytest.mark.parametrize(("conditions", "ids"), CONDITIONS, ids=lambda value: str(value)[:50])
def test_conditions(contents: Contents, which: Which, conditions: dict[str, object], ids: str | None) -> None:
    """Each condition alone, and several, which must all be met; the oldest come first, ids in their own order."""
    refused = "550 5.1.1 No such user"
    put(contents, which, id_of("a"), age=4 * HOUR, reply=refused, group="r0123456789ab")
    put(contents, which, id_of("b"), age=2 * HOUR, sender="", reply="550-5.1.1 no such mailbox here")
    put(contents, which, id_of("c"), age=500, recipients=("first@b.test", "second@c.test"), owed=(1,),
        reply="550 5.1.10 null MX")  # fmt: skip
    put(contents, which, id_of("d"), age=400, sender="else@a.test", client="10.1.2.3", size=5000, reply="554 spam 550")
    put(contents, which, id_of("e"), age=300, client="2001:db8::1", attempts=5, reply="451 4.7.1 greylisted")
    put(contents, which, id_of("f"), age=200, sender="from@b.test", reply="connection refused: 550 times")
    put(contents, which, id_of("g"), age=100, to="other")
    if ids is None:
        with pytest.raises(UnknownId, match=f"at other: {id_of('a')}$"):
            found(contents, which, **conditions)
    else:
        assert found(contents, which, **conditions) == list(ids)


def test_what_waits_behind_a_paused_backup_has_its_reason_as_the_reply(contents: Contents) -> None:
    """As the listing shows it; a copy that was tried has what was said of it."""
    put(contents, WAITING, id_of("a"))
    put(contents, WAITING, id_of("b"), reply="451 4.7.1 greylisted")
    contents.pause(reason="421 4.3.2 out of memory")
    assert found(contents, WAITING, code="421") == ["a"]
    assert found(contents, WAITING, reply="memory") == ["a"]


def test_unknown_destination(contents: Contents) -> None:
    """A destination that nobody knows is told."""
    with pytest.raises(UnknownDestination):
        found(contents, WAITING, destination="nowhere")
    with pytest.raises(UnknownDestination):
        selection.size(contents.connection, FAILED, Filter(destination="nowhere"))


@pytest.mark.parametrize("wrong", ["", "x", "> 3 4", ">=", "3.5", "-1", "!3"])
def test_attempts_that_are_none(wrong: str) -> None:
    """What is no number is not taken for one."""
    with pytest.raises(ValueError, match="attempts"):
        Attempts.read(wrong)


@pytest.mark.parametrize("wrong", ["", "1xx", "5500", "x50", "5.1", "550 5.1.1"])
def test_codes_that_are_none(wrong: str) -> None:
    """What begins no reply about a copy is told, and not looked for."""
    with pytest.raises(ValueError, match="reply code"):
        selection.code(wrong)


# How much is looked at


class Counted:
    """A client that counts what it is asked for."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.commands: list[str] = []

    def __getattr__(self, name: str) -> object:
        attribute = getattr(self.client, name)
        if not callable(attribute):
            return attribute

        def counted(*arguments: object, **options: object) -> object:
            self.commands.append(name)
            return attribute(*arguments, **options)

        return counted


@pytest.mark.parametrize("which", [WAITING, FAILED], ids=["waiting", "failed"])
@pytest.mark.parametrize("chosen", [Filter(limit=5), Filter(ids=(id_of("a"),)), Filter(newer=30.0)], ids=str)
def test_what_bounds_a_selection_bounds_its_cost(contents: Contents, which: Which, chosen: Filter) -> None:
    """With a limit, with ids, with a time, as little is asked in 5,000 copies as in a few."""
    put(contents, which, id_of("a"), age=10.0)

    def cost() -> tuple[int, int]:
        counted = Counted(contents.connection)
        pages = list(selection.select(counted, which, replace(chosen, destination="new"), whole=True))
        return len(counted.commands), sum(page.looked_at for page in pages)

    few, _ = cost()
    contents.many(5_000, failed=which is FAILED)
    many, looked_at = cost()
    assert many <= few + 1
    assert looked_at <= 40  # 30 seconds of a copy a second, and the skew of two clocks


def test_no_envelope_is_read_unless_something_is_asked_of_it(contents: Contents) -> None:
    """Replies, attempts and the ages of failures are told from the states and the list alone: no body store is read."""
    contents.many(50, failed=True)
    counted = Counted(contents.connection)
    chosen = Filter(code="550", attempts=Attempts(">", 0), older=10.0)
    (page,) = [p for p in selection.select(counted, FAILED, chosen) if p.looked_at]
    assert len(page.found) == 40
    assert "eval" not in counted.commands


def test_what_comes_back_meanwhile_is_not_met_twice(contents: Contents) -> None:
    """A copy that is tried again and fails anew while the list is read has had its turn."""
    contents.many(2500, failed=True)
    seen: list[str] = []
    for page in selection.select(contents.connection, FAILED, Filter()):
        seen += [copy.id for copy in page.found]
        clock = changes.now(contents.connection)
        contents.connection.zadd(keys.FAILED + "new", {copy.id: clock + n for n, copy in enumerate(page.found)})
    assert len(seen) == len(set(seen)) == 2500


# What is done to what was selected


def test_a_drop_leaves_what_is_being_delivered_or_has_failed_anew(contents: Contents) -> None:
    """Only what is as it was when it was selected goes; the count says how many."""
    ids = [contents.pending() for _ in range(4)]
    scores = {i: contents.connection.zscore(keys.PENDING + "new", i) or 0.0 for i in ids}
    contents.claim(contents.enqueue(ids[0]), ids[0])
    contents.connection.zrem(keys.PENDING + "new", ids[1])  # delivered
    contents.connection.zadd(keys.PENDING + "new", {ids[2]: scores[ids[2]] + 1})  # failed, and tried again
    assert backlog.drop_copies(contents.connection, "new", scores) == 1
    assert sorted(contents.pending_ids()) == sorted([ids[0], ids[2]])
    assert contents.has_body(ids[0])

    first, second = contents.failed(), contents.failed()
    scores = {i: contents.connection.zscore(keys.FAILED + "new", i) or 0.0 for i in (first, second)}
    listed_copies.retry(contents.connection, [first])
    (job,) = (job for job, held in contents.queued().items() if held == [first])
    contents.claim(job, first)
    anew = contents.fail(first, "554 5.7.1 another reason", attempts=1)
    assert failed.drop_copies(contents.connection, "new", scores) == 1
    assert contents.failed_ids() == [first]
    assert anew.job in contents.queue().failed_job_registry.get_job_ids()


def test_a_flush_of_some_leaves_the_others_their_time(contents: Contents) -> None:
    """Copies that were deferred together: the chosen ones are due now, in a job of their own, the others as before."""
    ids = [contents.pending() for _ in range(5)]
    job = contents.defer(*ids, seconds=300.0)
    assert backlog.flush_copies(contents.connection, "new", ids[:2]) == 2
    ((now, held),) = contents.queued().items()
    assert held == ids[:2]
    assert sorted(c.id for c in contents.claim(now, *held)) == sorted(ids[:2])
    assert sorted(c.id for c in contents.claim(job, *ids)) == sorted(ids[2:])
    rows = {row.id: row.next_attempt_at for row in listed_copies.waiting(contents.connection)}
    assert [rows[i] is None for i in ids] == [True, True, False, False, False]


def test_a_flush_does_not_double_what_is_due(contents: Contents) -> None:
    """What was never tried, or is in a job that is queued already, gets no other job; a paused server is probed."""
    fresh, delivered = contents.pending(), contents.pending()
    contents.connection.zrem(keys.PENDING + "new", delivered)
    assert backlog.flush_copies(contents.connection, "new", [fresh, delivered]) == 1
    assert contents.queued() == {}
    assert contents.connection.hget(keys.HEALTH + "new", "flush") == b"1"


# What cannot be read


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that makes a key file and uses it, for this test only."""
    monkeypatch.setattr(encryption, "_ring", None)

    def use(name: str) -> Path:
        encryption.add_key(tmp_path / name)
        encryption.use(tmp_path / name)
        return tmp_path / name

    return use


def test_sealed_mail_is_selected_with_its_key_and_told_without(
    contents: Contents, key_file: Callable[[str], Path]
) -> None:
    """With another key no condition about the envelope is met, and a page says why; states are not sealed."""
    first = key_file("first")
    put(contents, FAILED, id_of("a"), reply="550 no")
    assert found(contents, FAILED, sender="from@a.test") == ["a"]
    key_file("second")
    pages = list(selection.select(contents.connection, FAILED, Filter(sender="from@a.test")))
    assert [copy.id for page in pages for copy in page.found] == []
    assert [list(page.unread) for page in pages if page.unread] == [[id_of("a")]]
    assert "sealed with key" in next(iter(pages[0].unread.values()))
    assert found(contents, FAILED, code="550") == ["a"]
    encryption.use(first)


def test_a_damaged_health_stops_nobody(contents: Contents) -> None:
    """What is no time, or no reason, counts as not said."""
    contents.register(Destination(name="new", host="localhost", port=25))
    put(contents, WAITING, id_of("a"))
    contents.connection.hset(
        keys.HEALTH + "new", mapping={"state": "paused", "probe_at": "soon", "reason": b"\xff" * 5000}
    )
    (row,) = listed_copies.waiting(contents.connection, "new")
    assert row.next_attempt_at is None
    assert len(row.last_reply) <= 1000
