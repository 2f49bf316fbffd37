"""What a backup says about a connection that was used before is never taken for a word about the copy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest
import redis
from rq.registry import ScheduledJobRegistry

from relay.ledger import keys
from support import listed_copies
from support.connection_limits import REFUSALS, beyond
from support.ledger_contents import Contents, settings
from support.reactions import Moment
from support.scripted_server import EXTENSIONS, ScriptedServer
from workers.delivery.courier import Courier
from workers.queues import backlog

Scripted = Callable[..., ScriptedServer]


@asynccontextmanager
async def courier(redis_url: str, backup: ScriptedServer, **options: Any) -> AsyncIterator[Courier]:
    """A courier with few connections, each of which is to carry as much as the server takes."""
    destination = backup.destination("new", **{"messages_per_connection": 0, "connections": 2, **options})
    made = Courier(settings(), destination, "worker", redis_url)
    await made.start()
    try:
        yield made
    finally:
        await made.drain()


@pytest.fixture
def make_contents(redis_client: redis.Redis) -> Callable[[ScriptedServer], Contents]:
    def make(backup: ScriptedServer) -> Contents:
        made = Contents(redis_client, "new")
        made.register(backup.destination("new"))
        return made

    return make


def unsettled(redis_client: redis.Redis) -> int:
    """How many copies wait or have failed."""
    return int(redis_client.zcard(keys.PENDING + "new")) + int(redis_client.zcard(keys.FAILED + "new"))


def limits_of_a_connection() -> Iterator[Any]:
    """Yield every refusal at every command, one by one or pipelined; the other of these two is for --long."""
    for (a, refusal), (b, command) in product(enumerate(REFUSALS), enumerate(("MAIL", "RCPT", "RCPT TO:<c@", "DATA"))):
        for c, (name, extensions) in enumerate((("pipelining", EXTENSIONS), ("plain", ("SIZE 1000000",)))):
            marks = [pytest.mark.long] if (a + b + c) % 2 else []
            yield pytest.param(refusal, command, extensions, id=f"{refusal}-{command}-{name}", marks=marks)


@pytest.mark.parametrize(("refusal", "command", "extensions"), [*limits_of_a_connection()])
async def test_a_limit_of_the_connection(
    scripted: Scripted,
    make_contents: Any,
    redis_url: str,
    redis_client: redis.Redis,
    refusal: Any,
    command: str,
    extensions: Any,
) -> None:
    """A server that carries so many messages on a connection has all copies at once, each recipient's exactly once.

    More than follow each other smoothly before MAIL is sent behind a dot, so that such a one is refused, too.
    """
    backup = scripted({command: beyond(25, refusal)}, extensions=extensions)
    contents = make_contents(backup)
    ids = [contents.pending("b@example.com", "c@example.com") for _ in range(80)]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", ids)
    assert not unsettled(redis_client)
    told = sorted(recipient for t in backup.messages for recipient in t.recipients)
    assert told == ["b@example.com"] * 80 + ["c@example.com"] * 80


@pytest.mark.parametrize(
    "reply",
    [
        *("452 4.5.3 Too many", "451 4.5.3 Too many", "550 5.5.3 Too many", "503 5.5.3 Too many", "554 5.5.3 Too many"),
        *("552 Too many recipients", "550 too many rcpts"),
    ],
)
@pytest.mark.parametrize("counted", ["RCPT", "DATA", "."])
async def test_too_many_recipients(
    scripted: Scripted, make_contents: Any, redis_url: str, redis_client: redis.Redis, reply: str, counted: str
) -> None:
    """However a server says that a transaction has too many, and whenever: the rest goes at once in others."""

    def react(moment: Moment) -> str | None:
        count = len(moment.connection.transactions[-1].recipients)
        return reply if count >= 3 + (counted != "RCPT") else None

    backup = scripted({counted: react})
    contents = make_contents(backup)
    names = tuple(f"r{number}@example.com" for number in range(10))
    message_id = contents.pending(*names)
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
    assert not unsettled(redis_client)
    assert sorted(recipient for t in backup.messages for recipient in t.recipients) == sorted(names)


async def test_the_rest_is_not_failed_with_those_before(
    scripted: Scripted, make_contents: Any, redis_url: str, redis_client: redis.Redis
) -> None:
    """The message is refused at its dot for those in the transaction; who was too many for it has one of his own."""
    backup = scripted(
        {
            "RCPT": lambda m: "550 5.5.3 Too many" if len(m.connection.transactions[-1].recipients) >= 2 else None,
            ".": ["554 5.6.0 not for them", None],
        }
    )
    contents = make_contents(backup)
    message_id = contents.pending("a@example.com", "b@example.com", "c@example.com")
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
    assert [t.recipients for t in backup.messages] == [["c@example.com"]]
    assert redis_client.zcard(keys.FAILED + "new") == 1


async def test_announced_limits(
    scripted: Scripted, make_contents: Any, redis_url: str, redis_client: redis.Redis
) -> None:
    """LIMITS (RFC 9422) is kept to: messages on a connection, recipients and domains in a transaction."""
    backup = scripted(extensions=[*EXTENSIONS, "LIMITS MAILMAX=4 RCPTMAX=3 RCPTDOMAINMAX=1"])
    contents = make_contents(backup)
    names = [f"{local}@{domain}" for domain in ("one.example", "two.example") for local in "abcd"]
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [contents.pending(*names) for _ in range(30)])
    assert not unsettled(redis_client)
    assert sorted(r for t in backup.messages for r in t.recipients) == sorted(names * 30)
    assert max(len(connection.transactions) for connection in backup.connections) <= 4
    assert all(len(t.recipients) <= 3 for t in backup.messages)
    assert all(len({r.partition("@")[2] for r in t.recipients}) == 1 for t in backup.messages)


@pytest.mark.parametrize(
    ("said", "option", "most"), [("OK id=1vPabc-000000001Xy-2zAB", 100, 10), ("OK id=", 200, 30), ("OK", 100, 30)]
)
async def test_an_exim_gets_ten_messages_on_a_connection(
    scripted: Scripted, make_contents: Any, redis_url: str, said: str, option: int, most: int
) -> None:
    """By its default it says yes to the eleventh and leaves it in its queue; what an operator has set counts alone."""
    backup = scripted({".": f"250 {said}"})
    contents = make_contents(backup)
    async with courier(redis_url, backup, connections=1, messages_per_connection=option) as made:
        await made.deliver("job", [contents.pending() for _ in range(30)])
    assert len(backup.messages) == 30
    assert max(len(connection.transactions) for connection in backup.connections) == most


@pytest.mark.parametrize("how", ["flush", "retry"])
async def test_an_operators_retry_opens_new_connections(
    scripted: Scripted, make_contents: Any, redis_url: str, redis_client: redis.Redis, how: str
) -> None:
    """A server that keeps to old settings on old connections is asked on new ones when an operator says so."""
    backup = scripted({"RCPT": "450 4.2.0 later" if how == "flush" else "550 5.1.1 unknown"})
    contents = make_contents(backup)
    message_id = contents.pending()
    async with courier(redis_url, backup) as made:
        await made.deliver("job", [message_id])
        old = len(backup.connections)
        backup.replies["RCPT"] = lambda moment: "550 5.1.1 unknown" if moment.connection.index < old else None
        if how == "flush":
            backlog.flush(redis_client, "new")
            (job,) = ScheduledJobRegistry("backup-new", connection=redis_client).get_job_ids()
        else:
            listed_copies.retry(redis_client, [message_id], "new")
            (job,) = contents.queued()
        await made.deliver(job, [message_id])
    assert not unsettled(redis_client)
    assert [t.connection for t in backup.messages] == [old]
