"""A server that hangs on one message holds up that message alone; one that hangs on everything is in trouble."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis

from relay.ledger import keys
from support.ledger_contents import Contents, settings
from support.reactions import Delay, Moment, Reaction, Silence, Trickle
from support.running_courier import arrived, at_the_dot, at_work, named
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.delivery import runners
from workers.delivery.courier import Courier
from workers.jobs import Interrupted


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


def mail(contents: Contents, count: int) -> list[str]:
    return [contents.pending(f"good{n}@test", sender=f"s{n}@test") for n in range(count)]


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("place", [0, 17, 60])
async def test_one_that_hangs(
    contents: Contents, redis_url: str, backup: ScriptedServer, command: str, place: int
) -> None:
    """Whatever it hangs at, wherever in the queue: all others arrive before its minute is over, the next job's, too."""
    hangs = contents.pending("a@test", sender="hang@test")
    good = mail(contents, 80)
    backup.replies[command] = named("hang", Silence()) if command == "MAIL" else at_the_dot("hang", Silence())
    async with at_work(redis_url, backup, relay_timeout_seconds="60") as work:
        work.add([*good[:place], hangs, *good[place:70]])
        work.add(good[70:])
        await until(lambda: len(arrived(backup)) == len(good), 40, lambda: f"{len(arrived(backup))} came")
        assert work.courier.accepting
        assert contents.pending_ids() == [hangs] or len(contents.pending_ids()) < 20
    assert len({m.wire for m in backup.messages if m.sender != "hang@test"}) == len(good)


@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA"])
async def test_a_stop_waits_for_no_server_that_is_silent(
    contents: Contents,
    redis_url: str,
    redis_client: redis.Redis,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """What has not come to its dot is broken off, and its copies are as if they had not been tried."""
    monkeypatch.setattr("workers.delivery.draining.PATIENCE", 0.3)
    backup.replies[stage] = Silence()
    ids = mail(contents, 5)
    patient = {
        "relay_timeout_seconds": "60",
        "relay_greeting_timeout_seconds": "60",
        "relay_command_timeout_seconds": "60",
    }
    made = Courier(settings(**patient), backup.destination("new"), "worker", redis_url)
    await made.start()
    delivery = asyncio.create_task(made.deliver("job", ids))
    if stage == "CONNECT":
        await until(lambda: backup.open_connections > 0)
    else:
        await until(lambda: any(command.startswith(stage) for command in backup.commands))
    begun = time.monotonic()
    await made.drain()
    assert time.monotonic() - begun < 30
    with pytest.raises(Interrupted):
        await delivery
    assert sorted(contents.pending_ids()) == sorted(ids)
    assert [contents.state(message_id).attempts for message_id in ids] == [0] * 5
    assert redis_client.zcard(keys.BUSY + "new") == 0
    backup.drop()


async def test_several_that_hang_at_the_dot(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A dozen messages that hang, the first in the queue, cost their seconds and a connection each."""
    hang = [contents.pending("a@test", sender=f"hang{n}@test") for n in range(12)]
    good = mail(contents, 60)
    backup.replies["."] = at_the_dot("hang", Silence())
    async with at_work(redis_url, backup) as work:
        work.add(hang[:3] + good[:20] + hang[3:] + good[20:])
        await until(lambda: len(arrived(backup)) == len(good), 40, lambda: f"{len(arrived(backup))} came")
        assert backup.open_connections <= 20 + len(hang)  # a silent one does not see that we have closed
    assert len({m.wire for m in backup.messages if "hang" not in m.sender}) == len(good)


@pytest.mark.parametrize("connections", [1, 2, 3])
@pytest.mark.parametrize("places", [[0], [17], [0, 1], [0, 1, 2]])
async def test_few_connections(
    contents: Contents,
    redis_url: str,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    connections: int,
    places: list[int],
) -> None:
    """Those that hang and have all connections lose one for what waits; each is deferred, none is tried in a circle."""
    monkeypatch.setattr(runners, "PATIENCE", 3.5)
    good = mail(contents, 30)
    hang = [contents.pending("a@test", sender=f"hang{place}@test") for place in places]
    ids = list(good)
    for place, copy in zip(places, hang, strict=True):
        ids.insert(place, copy)
    backup.replies["."] = at_the_dot("hang", Silence())
    async with at_work(redis_url, backup, connections) as work:
        work.add(ids)
        # Each may cost its patience, after the first one twice as much, and a pause of the destination.
        await until(
            lambda: len(arrived(backup)) == len(good), 20 + 10 * len(hang), lambda: f"{len(arrived(backup))} came"
        )
        assert set(contents.pending_ids()) <= {*hang, *good}
    assert len(backup.messages) == len(good)
    assert all(sum(t.sender == f"hang{place}@test" for t in backup.transactions) == 1 for place in places)


async def test_a_server_that_is_slow_with_everything(
    contents: Contents, redis_url: str, backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One connection, each message takes longer than others should wait: the first teaches it, no other is repeated."""
    monkeypatch.setattr(runners, "PATIENCE", 3.2)
    good = mail(contents, 4)
    backup.replies["."] = (Delay(4), None)
    async with at_work(redis_url, backup, 1) as work:
        work.add(good)
        await until(lambda: len(contents.pending_ids()) <= 1, 30)
        assert contents.pending_ids() == good[:1]
        await until(lambda: contents.state(good[0]).attempts == 1)
    assert contents.state(good[0]).last_reply.startswith("451 4.4.2")


@pytest.mark.timeout(90)
async def test_a_server_that_hangs_on_everything(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """It gets some connections, not one for each message, and is paused; it answers, and all arrive, once."""
    good = mail(contents, 100)
    backup.replies["."] = Silence()
    async with at_work(redis_url, backup) as work:
        work.add(good)
        await until(lambda: not work.courier.accepting, 50)
        assert backup.open_connections <= 12
        backup.replies.clear()
        await until(lambda: len(arrived(backup)) >= len(good) - len(backup.connections), 30)
        assert len(backup.messages) == len(arrived(backup))


async def test_a_connection_that_is_never_greeted(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """One of many connections hangs before it is of use: the others go on, and the server is not blamed."""
    good = mail(contents, 80)

    def greeting(moment: Moment) -> Reaction:
        return Silence() if moment.connection.index in {1, 2} else None

    backup.replies["CONNECT"] = greeting
    async with at_work(redis_url, backup, relay_timeout_seconds="4") as work:
        work.add(good)
        await until(lambda: len(arrived(backup)) == len(good), 40, lambda: f"{len(arrived(backup))} came")
    assert len(backup.messages) == len(good)


@pytest.mark.parametrize("command", ["CONNECT", "MAIL"])
async def test_a_reply_that_never_ends(
    contents: Contents, redis_url: str, backup: ScriptedServer, command: str
) -> None:
    """An octet now and then is no reply: the deadline is for all of it."""
    (good,) = mail(contents, 1)
    reply = "220 " if command == "CONNECT" else "250 "
    backup.replies[command] = Trickle(reply + "x" * 400, 0.05)
    begun = time.monotonic()
    async with at_work(redis_url, backup, relay_timeout_seconds="1") as work:
        work.add([good])
        await until(lambda: not work.courier.accepting, 15)
        assert time.monotonic() - begun < 15  # of the twenty that its reply takes


async def test_a_body_that_is_not_read(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A server that stops reading in the middle of a large message holds up that message alone."""
    import os

    body = b"Subject: large\r\n\r\n" + b"\r\n".join(os.urandom(400).hex().encode() for _ in range(20_000)) + b"\r\n"
    large = contents.pending("a@test", sender="large@test", body=body)
    good = mail(contents, 40)
    backup.in_data = (1_000_000, Silence())
    async with at_work(redis_url, backup) as work:
        work.add([large, *good])
        await until(lambda: len(arrived(backup)) == len(good), 15, lambda: f"{len(arrived(backup))} came")
        assert work.courier.accepting
