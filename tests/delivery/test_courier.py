"""The courier alone, in the test's loop, between a real Redis and a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress

import pytest
import redis
from loguru import logger
from rq.registry import FailedJobRegistry, ScheduledJobRegistry

from relay import log_lines, maillog
from relay.ledger import copy_state, keys
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.reactions import Close, Gate, HalfClose, Reset, Silence
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import PATIENCE, until
from workers.delivery import draining, outbox
from workers.delivery.courier import Courier
from workers.delivery.retry import Width
from workers.jobs import Interrupted


@asynccontextmanager
async def courier(redis_url: str, backup: ScriptedServer, **options: str) -> AsyncIterator[Courier]:
    """A courier for "new", drained at the end; its connections carry as much as the server takes."""
    made = Courier(settings(**options), backup.destination("new", messages_per_connection=0), "worker", redis_url)
    await made.start()
    try:
        yield made
    finally:
        await made.drain()


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The copies that the log says may come twice, and why."""
    lines: list[str] = []
    monkeypatch.setattr(log_lines, "_events", None)  # in the words of loguru, whatever was configured before
    sink = logger.add(
        lambda line: lines.append(line.rstrip("\n")),
        format="{extra[id]} {extra[reason]}",
        filter=lambda record: record["message"] == "may repeat",
    )
    yield lines
    logger.remove(sink)


async def test_what_a_job_defers_leaves_as_one_job(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Greylisting of many at once makes one scheduled job, which owns them all."""
    ids = [contents.pending() for _ in range(40)]
    backup.replies["RCPT"] = "450 4.2.0 greylisted"
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
    (job,) = ScheduledJobRegistry("backup-new", connection=redis_client).get_job_ids()
    states = redis_client.hgetall(keys.OWN + "new")
    assert len(states) == 40
    assert {copy_state.CopyState.from_wire(s).job for s in states.values()} == {job}
    assert not redis_client.zcard(keys.BUSY + "new")


async def test_claimed_once(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """Two jobs with the same copies deliver them once."""
    ids = [contents.pending() for _ in range(10)]
    async with courier(redis_url, backup) as made:
        await made.deliver("one", ids)
        await made.deliver("two", ids)
    assert len(backup.messages) == 10


async def test_the_end_of_a_job_waits_for_no_later_group(
    contents: Contents,
    redis_url: str,
    redis_client: redis.Redis,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is settled leaves with the others of its job, and at the end of that at once, whatever came before."""
    monkeypatch.setattr(outbox, "_APART", 3600)
    async with courier(redis_url, backup) as made, asyncio.timeout(120):
        for job in "abc":
            await made.deliver(job, [contents.pending() for _ in range(5)])
            assert not redis_client.zcard(keys.PENDING + "new")
    assert len(backup.messages) == 15


async def test_a_large_body_is_fetched_in_its_turn(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A body that does not fit into a read-ahead arrives like any other."""
    import os

    body = b"Subject: large\r\n\r\n" + b"\r\n".join(os.urandom(400).hex().encode() for _ in range(2000)) + b"\r\n"
    message_id = contents.pending(body=body)
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
    assert backup.messages[0].wire == body


async def test_a_missing_body_is_counted_and_removed(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Pending without a body: logged, removed, and the others of the job go out."""
    lost, kept = contents.pending(), contents.pending()
    redis_client.delete(keys.MESSAGE + lost)
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [lost, kept])
    assert len(backup.messages) == 1
    assert redis_client.zcard(keys.PENDING + "new") == 0


async def test_drained_without_a_redis(
    redis_factory: Callable[..., RedisServer], backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that never comes back keeps no worker: after a while a drain interrupts the job that waits for it."""
    monkeypatch.setattr(outbox, "_STUCK", 0.5)
    server = redis_factory()
    with server.client() as client:
        contents = Contents(client, "new")
        contents.register(backup.destination("new"))
        message_id = contents.pending()
    gate = Gate()
    backup.replies["."] = (gate, None)
    made = Courier(settings(), backup.destination("new"), "worker", server.url)
    await made.start()
    delivering = asyncio.create_task(made.deliver("job", [message_id]))
    await gate.arrival()
    server.stop()
    gate.open()
    await until(lambda: made._outbox.is_late)
    async with asyncio.timeout(10):
        await made.drain()
        with pytest.raises(Interrupted):
            await delivering


async def test_drained_in_the_middle(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Told to drain, it finishes what is under way, gives the rest back untried, and says so."""
    ids = [contents.pending() for _ in range(30)]
    gate = Gate()
    backup.replies["."] = (gate, None)
    made = Courier(settings(), backup.destination("new"), "worker", redis_url)
    await made.start()
    job = asyncio.ensure_future(made.deliver("job", ids))
    await gate.arrival()
    end = asyncio.ensure_future(made.drain())
    await asyncio.sleep(0)
    gate.open()
    with pytest.raises(Interrupted):
        await job
    await end
    assert len(backup.messages) + redis_client.zcard(keys.PENDING + "new") == 30
    assert not redis_client.zcard(keys.BUSY + "new")
    assert not made.accepting


async def test_handed_over_during_a_drain(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A job that was fetched in the moment of a stop goes back at once, and its copies are leased to nobody."""
    made = Courier(settings(), backup.destination("new"), "worker", redis_url)
    await made.start()
    await made.deliver("first", [contents.pending()])  # there is a connection to Redis
    ids = [contents.pending() for _ in range(3)]
    end = asyncio.ensure_future(made.drain())
    await asyncio.sleep(0)
    handed_over = [asyncio.ensure_future(made.deliver("job", ids))]
    while not end.done():
        await asyncio.sleep(0)
        handed_over.append(asyncio.ensure_future(made.deliver("job", ids)))
    ends = await asyncio.gather(*handed_over, return_exceptions=True)
    assert {type(each) for each in ends} == {Interrupted}
    assert (redis_client.zcard(keys.BUSY + "new"), sorted(contents.pending_ids())) == (0, sorted(ids))
    assert len(backup.transactions) == 1


async def test_no_wait_of_a_drain_is_without_an_end(
    contents: Contents, redis_url: str, backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that waits for what never comes, and a close that never ends, are told of and given up."""
    for name, seconds in {"PATIENCE": 0.1, "IDLE_SECONDS": 1.0, "CLOSE_SECONDS": 0.1}.items():
        monkeypatch.setattr(draining, name, seconds)
    told: list[str] = []
    monkeypatch.setattr(maillog, "notice", lambda _level, text, **more: told.append(f"{text} {more.get('reason', '')}"))
    made = Courier(settings(), backup.destination("new"), "worker", redis_url)
    await made.start()

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(made._claiming, "claim", never)
    for closing in (made._pool, made._greetings, made._pipelines, made._outbox):
        monkeypatch.setattr(closing, "close", never)
    job = asyncio.ensure_future(made.deliver("job", [contents.pending()]))
    await until(lambda: made._deliveries)
    async with asyncio.timeout(PATIENCE):
        await made.drain()
        with pytest.raises(Interrupted):
            await job
    assert told == [
        "drain waits ",
        "outcomes lost ",
        "drain does not wait the connections to the server",
        "drain does not wait the notes of what it offers",
        "drain does not wait the questions to Redis",
        "drain does not wait the outcomes",
    ]


async def test_a_server_that_says_nothing_pauses_the_destination(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A black hole costs one deadline, opens the breaker, and burns no copy; nobody holds them until the next probe."""
    ids = [contents.pending() for _ in range(5)]
    backup.replies["CONNECT"] = Silence()
    async with courier(
        redis_url,
        backup,
        relay_timeout_seconds="0.3",
        relay_greeting_timeout_seconds="0.3",
        relay_command_timeout_seconds="0.3",
    ) as made:
        with pytest.raises(Interrupted):
            await made.deliver("job", ids)
        assert not made.accepting
        assert not redis_client.zcard(keys.BUSY + "new")
        backup.replies.clear()
        backup.drop()
        await until(lambda: made.accepting)
        await made.deliver("job", ids)
    assert len(backup.messages) == 5
    assert not redis_client.hlen(keys.OWN + "new")


async def test_what_cannot_be_represented_is_failed_with_advice(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A copy larger than the backup takes is in the failed list at once, and never tried."""
    backup.extensions[:] = ["PIPELINING", "SIZE 10"]
    message_id = contents.pending()
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
    (job,) = FailedJobRegistry("backup-new", connection=redis_client).get_job_ids()
    state = copy_state.CopyState.from_wire(redis_client.hget(keys.FAILURE + "new", message_id))
    assert state.job == job
    assert "raise its size limit" in state.last_reply
    assert not backup.transactions


async def test_broken_transactions_leave_somebody_to_probe(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """When a job's copies are all deferred as the breaker opens, the next job may be fetched, and is the probe."""
    ids = [contents.pending() for _ in range(4)]
    backup.replies["DATA"] = ("354 go ahead", Reset())
    async with courier(redis_url, backup, retry_longest="0.2", retry_first="0.1") as made:
        for message_id in ids:
            with suppress(Interrupted):
                await made.deliver(f"job {message_id}", [message_id])
        assert not made.accepting
        backup.replies.clear()
        await until(lambda: made.accepting)
        later = [contents.pending() for _ in range(2)]
        await made.deliver("last", later)
        assert made.accepting
    assert not set(later) & set(contents.pending_ids())


def _bodies(count: int) -> list[bytes]:
    return [b"Subject: %d\r\n\r\n..%s\r\n" % (n, b"x" * (n * 40)) for n in range(count)]


def _behind_dots(backup: ScriptedServer) -> int:
    return sum(connection.behind_dots for connection in backup.connections)


@pytest.mark.parametrize("lmtp", [False, True])
async def test_transactions_follow_each_other_behind_the_dot(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer, lmtp: bool
) -> None:
    """Once all goes well the next MAIL leaves with the dot before; every message arrives once, with its own bytes."""
    backup.lmtp = lmtp
    bodies = _bodies(200)
    ids = [contents.pending(body=body) for body in bodies]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
    assert _behind_dots(backup) > 100
    assert sorted(message.wire for message in backup.messages) == sorted(bodies)
    assert len(backup.connections) <= 40
    assert not redis_client.zcard(keys.PENDING + "new")
    assert not redis_client.zcard(keys.BUSY + "new")


async def test_nothing_follows_without_pipelining(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A server that does not offer PIPELINING hears one command at a time."""
    backup.extensions = ["8BITMIME"]
    ids = [contents.pending() for _ in range(100)]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
    assert len(backup.messages) == 100
    assert not any(connection.pipelined or connection.behind_dots for connection in backup.connections)


async def test_so_many_on_a_connection_and_no_more(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A server that says 421 to the eleventh MAIL of each connection is not in trouble: a new one takes the rest."""
    bodies = _bodies(150)
    ids = [contents.pending(body=body) for body in bodies]
    backup.replies["MAIL"] = lambda moment: (
        ("421 4.7.0 enough on this connection", Close()) if moment.connection.verbs.count("MAIL") > 10 else None
    )
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
        assert made.accepting
    assert sorted(message.wire for message in backup.messages) == sorted(bodies)
    assert not redis_client.zcard(keys.PENDING + "new")


async def test_a_server_that_closes_after_a_dot(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Whose MAIL went out behind the last dot is tried elsewhere, once; it is nobody's fault, and no attempt."""
    bodies = _bodies(120)
    ids = [contents.pending(body=body) for body in bodies]
    backup.replies["."] = [*[None] * 60, ("250 2.0.0 ok, and good bye", HalfClose()), *[None] * 10, Close(), None]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
        assert made.accepting
        assert not redis_client.hgetall(keys.OWN + "new") or len(redis_client.hgetall(keys.OWN + "new")) == 1
    assert _behind_dots(backup)
    # One dot was never answered: that copy alone is uncertain, and waits for its next try.
    assert redis_client.zcard(keys.PENDING + "new") == 1
    assert len({message.wire for message in backup.messages}) == len(backup.messages) == 119


async def test_nothing_is_believed_behind_a_refused_dot(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A server that refuses twice, before the dot and at it, fails the one copy, not the next one on the line."""
    ids = [contents.pending(body=body) for body in _bodies(120)]
    backup.replies["."] = [*[None] * 60, b"552 5.3.4 too big\r\n552 5.3.4 too big, I said\r\n", None]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
    assert _behind_dots(backup)
    assert redis_client.zcard(keys.FAILED + "new") == 1
    assert not redis_client.zcard(keys.PENDING + "new")
    assert len({message.wire for message in backup.messages}) == len(backup.messages) == 119


async def test_a_yes_to_data_is_no_yes_to_the_message(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A server out of step that answers DATA with 250 has not taken anything, and is no server to send more to."""
    message_id = contents.pending()
    backup.replies["DATA"] = "250 2.0.0 sure"
    async with courier(redis_url, backup) as made:
        with pytest.raises(Interrupted):
            await made.deliver("job", [message_id])
        assert not made.accepting
    assert redis_client.zcard(keys.PENDING + "new") == 1
    assert not backup.messages


async def test_what_another_worker_had_in_hand_is_logged_before_it_is_sent(
    contents: Contents, redis_url: str, backup: ScriptedServer, repeated: list[str]
) -> None:
    """The log says `may repeat` with each id by the time that its copy begins, whoever has ended the lease."""
    theirs, fresh = [contents.pending() for _ in range(3)], contents.pending()
    contents.claim("lost", *theirs, worker="gone", lease=0)
    gate = Gate()
    backup.replies["MAIL"] = (gate, None)
    async with courier(redis_url, backup) as made:
        delivery = asyncio.ensure_future(made.deliver("job", [*theirs, fresh]))
        await gate.arrival()
        assert sorted(repeated) == sorted(f"{i} worker gone had it in hand" for i in theirs)
        gate.open()
        await delivery
    assert len(backup.messages) == 4


async def test_a_delivery_that_breaks_off_behind_the_dot_is_logged(
    contents: Contents,
    redis_url: str,
    backup: ScriptedServer,
    repeated: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault of our own once the copy is sent leaves its line: it goes out again when its lease has run out."""
    message_id = contents.pending()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    async with courier(redis_url, backup) as made:
        monkeypatch.setattr(made._runs, "_read", broken)
        with suppress(RuntimeError):
            await made.deliver("job", [message_id])
        await until(lambda: len(made._runners) == 0)
    assert repeated == [f"{message_id} its delivery was broken off"]
    assert len(backup.messages) == 1


async def test_a_body_that_does_not_come_until_its_job_is_over(
    contents: Contents,
    redis_url: str,
    redis_client: redis.Redis,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Redis gives up on a large body when its job has returned: the copy has another job, and nobody holds it."""
    monkeypatch.setattr("workers.delivery.courier._STRAGGLER", 0.1)
    message_id = contents.pending()
    gone = asyncio.Event()

    async def gives_up(_: str) -> None:
        await gone.wait()
        raise redis.ConnectionError("gone")

    async with courier(redis_url, backup) as made:
        with monkeypatch.context() as patched:
            patched.setattr(made._bodies, "take", gives_up)
            await made.deliver("job", [message_id])
            gone.set()
            scheduled = ScheduledJobRegistry("backup-new", connection=redis_client)
            await until(scheduled.get_job_ids)
            await until(lambda: not made._leases.held)
        (again,) = scheduled.get_job_ids()
        await made.deliver(again, [message_id])
    assert len(backup.messages) == 1
    assert not redis_client.zcard(keys.PENDING + "new")


async def test_several_jobs_at_once(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Jobs that run together share the connections, and what two of them name is delivered once."""
    ids = [contents.pending(body=body) for body in _bodies(90)]
    async with courier(redis_url, backup) as made:
        await asyncio.gather(*(made.deliver(f"job {n}", ids[n * 20 : n * 20 + 30]) for n in range(4)))
    assert len(backup.messages) == 90
    assert len(backup.connections) <= 40
    assert not redis_client.zcard(keys.PENDING + "new")
    assert not redis_client.zcard(keys.BUSY + "new")


async def test_another_job_in_the_way_of_the_owner(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Two jobs name the same deferred copies at the same time: whichever asks first, their owner gets them."""
    ids = [contents.pending() for _ in range(10)]
    backup.replies["RCPT"] = "450 4.2.0 greylisted"
    async with courier(redis_url, backup) as made:
        await made.deliver("first", ids)
        (owner,) = ScheduledJobRegistry("backup-new", connection=redis_client).get_job_ids()
        backup.replies.clear()
        await asyncio.gather(made.deliver("stranger", ids), made.deliver(owner, ids), made.deliver("stranger", ids))
    assert len(backup.messages) == 10
    assert not redis_client.zcard(keys.PENDING + "new")


async def test_a_retry_of_what_is_in_hand(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """An operator retries for one recipient while the same worker delivers to another: both get it."""
    backup.replies["RCPT"] = ["550 5.1.1 no", "450 4.2.0 later"]
    message_id = contents.pending("one@test", "two@test")
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
        scheduled = ScheduledJobRegistry("backup-new", connection=redis_client)
        (owner,) = scheduled.get_job_ids()
        backup.replies.clear()
        gate = Gate()
        backup.replies["."] = (gate, None)
        delivery = asyncio.ensure_future(made.deliver(owner, [message_id]))
        await gate.arrival()
        assert listed_copies.retry(redis_client, [message_id]) == 1
        (retry,) = contents.queued()
        await made.deliver(retry, [message_id])
        gate.open()
        await delivery
        (again,) = set(scheduled.get_job_ids()) - {owner}
        await made.deliver(again, [message_id])
    assert sorted(m.recipients for m in backup.messages) == [["one@test"], ["two@test"]]
    assert not contents.failed_ids()


def test_width() -> None:
    """A far server gets more connections, a near one that is slow for a moment does not; a number that is set holds."""
    width = Width(0)
    assert width.now == 20
    for _ in range(3):
        width.note(0.1)
    assert width.now == 40
    width.note(0.001)
    width.note(0.5)
    assert width.now == 20
    width = Width(7)
    width.note(0.1)
    assert (width.now, width.most) == (7, 7)
