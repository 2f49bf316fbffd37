"""What a primary says about a connection that was used before is never taken for a word about the message.

The servers here refuse what they would take on a new connection: in MAIL, RCPT or DATA, by any code, or by closing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from support.connection_limits import REFUSALS, beyond
from support.dialogue import AsyncDialogue
from support.in_process_relay import serve, settings_of
from support.reactions import Moment
from support.scripted_server import EXTENSIONS, ScriptedServer

Scripted = Callable[..., ScriptedServer]
GROUP = ["MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "RCPT TO:<c@example.org>", "DATA"]
TEXT = b"Subject: x\r\n\r\ntext\r\n.\r\n"


async def deliver(client: AsyncDialogue, *, pipelined: bool) -> None:
    """Have one message accepted whose every command is accepted."""
    if pipelined:
        await client.send(*GROUP)
        for code in (250, 250, 250, 354):
            await client.expect(code)
    else:
        for line, code in zip(GROUP, (250, 250, 250, 354), strict=True):
            await client.say(line, code)
    await client.raw(TEXT)
    await client.expect(250)


@pytest.mark.parametrize("offered", [EXTENSIONS, ("SIZE 1000000",)], ids=["pipelining", "plain"])
@pytest.mark.parametrize("command", ["MAIL", "RCPT", "RCPT TO:<c@example.org>", "DATA"])
@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
async def test_a_limit_of_the_connection(
    scripted: Scripted, redis_url: str, refusal: Any, command: str, offered: Sequence[str]
) -> None:
    """A server that carries two messages on a connection and refuses more, anyhow and anywhere: no client hears of it.

    Whatever the client was told before stays true: each message has both recipients, each once.
    """
    primary = scripted({command: beyond(2, refusal)}, extensions=offered)
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        for number in range(7):
            await deliver(client, pipelined=number % 2 == 0)
    assert len(primary.messages) == 7
    assert all(t.recipients == ["b@example.com", "c@example.org"] for t in primary.messages)
    assert max(sum(t.accepted for t in connection.transactions) for connection in primary.connections) == 2


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
async def test_a_server_that_refuses_everybody(scripted: Scripted, redis_url: str, command: str) -> None:
    """What a new connection refuses, too, is the client's reply; the server is not asked everything twice."""
    primary = scripted()
    refusal = "451 4.3.0 Out of service until 12:%02d, see <%d@example.com>"
    async with serve(settings_of(primary.address), redis_url) as (context, port):
        clients = [await AsyncDialogue.open(port) for _ in range(20)]
        for client in clients:
            await client.hello()
            await client.say(GROUP[0], 250)  # so that each has a connection of its own
        for client in clients:
            for line, code in zip(GROUP[1:], (250, 250, 354), strict=True):
                await client.say(line, code)
            await client.raw(TEXT)
            await client.expect(250)
        assert context.snapshot.primary.pool.idle == len(clients)
        count = 0

        def refused(_: Moment) -> str:
            nonlocal count
            count += 1
            return refusal % (count % 60, count)

        primary.replies[command] = refused
        for client in clients:
            await client.send(*GROUP[: [line[:4] for line in GROUP].index(command) + 1])
            replies = [await client.reply() for _ in range([line[:4] for line in GROUP].index(command) + 1)]
            assert replies[-1].startswith("451 4.3.0 Out of service")
            await client.close()
    assert len(clients) < len([c for c in primary.commands if c.startswith("MAIL")]) - len(clients) + 1
    assert len(primary.connections) <= len(clients) + 3  # and those that the refusals retired are not many either


async def test_what_is_about_the_mailbox_is_asked_once(scripted: Scripted, redis_url: str) -> None:
    """An unknown user on a reused connection is unknown: nothing is repeated."""
    primary = scripted()
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await deliver(client, pipelined=False)
        primary.replies["RCPT TO:<b@"] = "550 5.1.1 unknown"
        await client.say(GROUP[0], 250)
        await client.say(GROUP[1], "550 5.1.1")
        await client.say(GROUP[2], 250)
    assert len(primary.connections) == 1


async def test_a_recipient_that_a_new_connection_refuses(scripted: Scripted, redis_url: str) -> None:
    """Accepted on the old connection and refused on the new one: the transaction is lost, and the client is told."""
    primary = scripted({"DATA": beyond(1, "451 4.4.5 no more"), "RCPT TO:<b@": [None, None, "550 5.1.1 gone"]})
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await deliver(client, pipelined=False)
        for line, code in zip(GROUP, (250, 250, 250, "451 4.4.2"), strict=True):
            await client.say(line, code)
        await client.say("RSET", 250)
        primary.replies.clear()
        await deliver(client, pipelined=True)
    assert [t.recipients for t in primary.messages] == [["b@example.com", "c@example.org"]] * 2


async def test_refusals_are_not_handed_on(scripted: Scripted, redis_url: str) -> None:
    """The connection on which one client's recipients were refused is not lent to the next client."""
    primary = scripted({"RCPT TO:<no": "550 5.1.1 unknown"})
    async with serve(settings_of(primary.address), redis_url) as (_, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.say(GROUP[0], 250)
            for number in range(5):
                await client.say(f"RCPT TO:<no{number}@example.com>", 550)
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await deliver(client, pipelined=False)
    assert [len(connection.transactions) for connection in primary.connections] == [1, 1]


@pytest.mark.parametrize(
    "reply",
    ["550 5.5.3 Too many", "503 5.5.3 Too many", "554 5.5.3 Too many", "552 Too many recipients", "550 too many rcpts"],
)
async def test_too_many_recipients_in_other_words(scripted: Scripted, redis_url: str, reply: str) -> None:
    """A limit on one transaction never bounces a recipient: the client hears 452 and sends the rest again."""
    primary = scripted({"RCPT": lambda m: reply if len(m.connection.transactions[-1].recipients) >= 2 else None})
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.say(GROUP[0], 250)
        for line, answer in zip("abc", (250, 250, "452 4.5.3"), strict=True):
            await client.say(f"RCPT TO:<{line}@example.com>", answer)
        await client.body(TEXT[:-3])
    assert [t.recipients for t in primary.messages] == [["a@example.com", "b@example.com"]]


@pytest.mark.parametrize("reply", ["552 5.2.2 Mailbox full", "552 5.3.4 Too large for it", "550 5.1.1 unknown"])
async def test_what_is_no_limit_of_a_transaction(scripted: Scripted, redis_url: str, reply: str) -> None:
    """A refusal of one recipient is passed on as it is."""
    primary = scripted({"RCPT TO:<c@": reply})
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        for line, answer in zip(GROUP[:3], (250, 250, reply), strict=True):
            await client.say(line, answer)


@pytest.mark.parametrize("pipelined", [True, False])
async def test_announced_limits(scripted: Scripted, redis_url: str, pipelined: bool) -> None:
    """LIMITS (RFC 9422) is kept to: messages on a connection, recipients and domains in a transaction."""
    limits = "LIMITS MAILMAX=3 RCPTMAX=2 RCPTDOMAINMAX=1"
    primary = scripted(extensions=[*EXTENSIONS, limits])
    group = [
        "MAIL FROM:<a@example.com>",
        *(f"RCPT TO:<{name}>" for name in ("b@example.com", "c@other.example", "d@Example.com", "e@example.com")),
        "DATA",
    ]
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        for _ in range(4):
            codes = ("250", "250", "452 4.5.3", "250", "452 4.5.3", "354")
            if pipelined:
                await client.send(*group)
            for line, code in zip(group, codes, strict=True):
                await (client.expect(code) if pipelined else client.say(line, code))
            await client.raw(TEXT)
            await client.expect(250)
    assert [len(connection.transactions) for connection in primary.connections] == [3, 1]
    assert all(t.recipients == ["b@example.com", "d@Example.com"] for t in primary.messages)
    assert not any("other.example" in command for command in primary.commands)
