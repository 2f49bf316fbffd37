"""A courier keeps to what an operator wants: nothing goes to a held server, and all couriers share a throttle."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack

import pytest
import redis

from relay.ledger import changes, health, keys
from support.ledger_contents import Contents, settings
from support.reactions import Gate
from support.running_courier import at_work
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.upkeep.sweep import Sweeper


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


async def test_nothing_goes_to_a_held_server_until_it_is_released(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Held before the worker starts: no copy is claimed. A release lets all of them go, none counts an attempt more."""
    health.hold(redis_client, "new", 0, "maintenance", "alice")
    ids = [contents.pending() for _ in range(30)]
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await asyncio.sleep(0)
        assert not work.courier.accepting
        await until(lambda: redis_client.hget(keys.HEALTH + "new", "state") == b"ok")
        assert backup.messages == []
        assert redis_client.zcard(keys.BUSY + "new") == 0
        health.release(redis_client, "new")
        await until(lambda: contents.pending_ids() == [])
    assert len(backup.messages) == 30


async def test_a_hold_under_load_gives_back_what_is_not_begun(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """What is under way ends; the rest is untouched, without a lease, and the job is there to be taken again."""
    ids = [contents.pending() for _ in range(200)]
    gate = Gate()
    backup.replies["."] = (gate, None)
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await gate.arrival()
        health.hold(redis_client, "new", 0, "maintenance", "alice")
        await until(lambda: not work.courier.accepting)
        gate.open()
        await until(lambda: not work.courier.accepting and redis_client.zcard(keys.BUSY + "new") == 0)
        left = len(contents.pending_ids())
        assert 0 < len(backup.messages) < 200
        assert left == 200 - len(backup.messages)
        await until(lambda: sum(len(job_ids) for _, job_ids in work.jobs) >= left)
        health.release(redis_client, "new")
        await until(lambda: contents.pending_ids() == [])
    assert len(backup.messages) == 200


async def test_a_hold_ends_by_itself_and_says_so(
    contents: Contents,
    redis_url: str,
    redis_client: redis.Redis,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With --for, delivery goes on at its end, with a line in the log."""
    told: list[bool] = []
    monkeypatch.setattr("relay.maillog.destination_released", lambda name, *, has_ended: told.append(has_ended))
    health.hold(redis_client, "new", 1.5, "a moment", "alice")
    ids = [contents.pending()]
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await until(lambda: contents.pending_ids() == [])
        await until(lambda: told == [True])


@pytest.mark.parametrize("was_held", [True, False])
async def test_time_held_burns_no_copy(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer, was_held: bool
) -> None:
    """A copy that is older than retry.give_up, but was held for most of that, is put off again and not given up."""
    backup.replies["RCPT"] = "450 4.2.0 later"
    message_id = contents.pending(age=7200)
    clock = changes.now(redis_client)
    if was_held:
        redis_client.hset(keys.HEALTH + "new", "held_past", json.dumps([[clock - 7000, clock - 10]]))
    async with at_work(redis_url, backup, retry_give_up="1h") as work:
        work.add([message_id])
        await until(lambda: contents.state(message_id).attempts == 1 or contents.failed_ids() == [message_id])
    assert contents.failed_ids() == ([] if was_held else [message_id])


@pytest.mark.parametrize("was_held", [True, False])
def test_time_held_burns_no_copy_of_a_paused_backup(
    contents: Contents, redis_client: redis.Redis, was_held: bool
) -> None:
    """The reconciler gives up what nobody can try: time held does not count there either."""
    message_id, fresh = contents.pending(age=7200), contents.pending()
    contents.pause()
    clock = changes.now(redis_client)
    if was_held:
        redis_client.hset(keys.HEALTH + "new", "held", json.dumps([clock - 7000, 0, "x", "alice"]))
    Sweeper(redis_client, settings(retry_give_up="1h")).sweep()
    assert contents.failed_ids() == ([] if was_held else [message_id])
    assert fresh in contents.pending_ids()


async def test_a_held_server_that_was_away_is_probed_without_a_copy(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """One sees that it is back; no mail goes there for that."""
    backup.replies["MAIL"] = "421 4.3.2 not now"
    ids = [contents.pending()]
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await until(lambda: redis_client.hget(keys.HEALTH + "new", "state") == b"paused")
        health.hold(redis_client, "new", 0, "maintenance", "alice")
        await until(lambda: work.courier._hold_and_throttle.is_held)
        # A copy that was sent as a probe before that is put off once more: the server takes mail only now.
        await until(lambda: redis_client.hget(keys.HEALTH + "new", "state") == b"ok")
        backup.replies.clear()
        assert (backup.messages, contents.pending_ids()) == ([], ids)
        health.release(redis_client, "new")
        await until(lambda: contents.pending_ids() == [])


async def test_two_couriers_share_a_rate(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Together they begin no more than the rate allows, and not much less: both have enough to do."""
    with redis_client.pipeline() as pipe:
        health.throttle(pipe, "new", 40.0, 0)
        pipe.execute()
    ids = [contents.pending() for _ in range(160)]
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(at_work(redis_url, backup, worker=name)) for name in "ab"]
        first.add(ids[:80])
        second.add(ids[80:])
        begun = time.monotonic()
        await until(lambda: len(backup.messages) == 160, 60)
        seconds = time.monotonic() - begun
    assert seconds >= (160 - 40 - 40) / 40 - 0.5


async def test_a_throttle_narrows_and_ends(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """--connections bounds how many are open at once; --off lets everything go on."""
    with redis_client.pipeline() as pipe:
        health.throttle(pipe, "new", 0.001, 2)
        pipe.execute()
    ids = [contents.pending() for _ in range(50)]
    async with at_work(redis_url, backup) as work:
        await until(lambda: work.courier._pool.room == 2)
        work.add(ids)
        with redis_client.pipeline() as pipe:
            health.throttle(pipe, "new", 0.0, 2)
            pipe.execute()
        await until(lambda: contents.pending_ids() == [])
        assert work.courier._pool.room == 2
        with redis_client.pipeline() as pipe:
            health.throttle(pipe, "new", 0.0, 0)
            pipe.execute()
        await until(lambda: work.courier._pool.room > 2)
