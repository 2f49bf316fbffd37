"""Real servers at their defaults, as primary and as backup: what they limit is not noticed by anybody."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from relay.ledger import keys
from relay.mail.destination import Destination
from support import opensmtpd_instance
from support.dialogue import AsyncDialogue
from support.exim_instance import EximInstance
from support.in_process_relay import serve, settings_of
from support.ledger_contents import Contents, settings
from support.opensmtpd_instance import OpenSmtpdInstance
from support.postfix_instance import PostfixInstance
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.delivery.courier import Courier

StartPostfix = Callable[[PostfixInstance], PostfixInstance]
COUNT = 230  # more than two connections of an OpenSMTPD carry


@pytest.fixture(scope="module")
def opensmtpd_program() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="smtp-dup-opensmtpd-") as folder:
        program, reason = opensmtpd_instance.unpack(Path(folder))
        if program is None:
            pytest.skip(reason)
        yield program


@pytest.fixture
def opensmtpd(opensmtpd_program: Path, backup: ScriptedServer) -> Iterator[OpenSmtpdInstance]:
    """A started OpenSMTPD that relays to the scripted server."""
    instance = OpenSmtpdInstance(opensmtpd_program, backup.address)
    try:
        yield instance.start()
    finally:
        instance.remove()


@pytest.fixture
def exim(exim_program: Path) -> Iterator[EximInstance]:
    """A started Exim that has its own defaults for what a connection may carry."""
    instance = EximInstance(exim_program, session_limits=False)
    try:
        yield instance.start()
    finally:
        instance.remove()


async def send(primary: str, redis_url: str, count: int, **options: str) -> None:
    """Send so many messages, each from a client with a connection of its own; all must be accepted."""
    given = {f"relay.{name}": value for name, value in options.items()}
    async with serve(settings_of(primary, given), redis_url) as (_, port):
        for _ in range(count):
            async with await AsyncDialogue.open(port) as client:
                await client.hello()
                await client.mail("a@example.com", "b@example.com")


async def deliver(host: str, port: int, redis_url: str, connection: redis.Redis, count: int, **options: int) -> None:
    """Have a courier deliver so many copies; none may be left."""
    server = Destination("new", host, port)
    contents = Contents(connection, "new")
    contents.register(server)
    ids = [contents.pending("b@example.com") for _ in range(count)]
    made = Courier(settings(), replace(server, **options), "worker", redis_url)
    await made.start()
    try:
        await made.deliver("job", ids)
    finally:
        await made.drain()
    assert not connection.zcard(keys.PENDING + "new")
    assert not connection.zcard(keys.FAILED + "new")


@pytest.mark.parametrize("messages", ["10", "0"])
async def test_opensmtpd_as_primary(opensmtpd: OpenSmtpdInstance, redis_url: str, messages: str) -> None:
    """It takes 100 messages on a connection and refuses the next with 452 4.5.3: no client hears of that."""
    await send(opensmtpd.address, redis_url, COUNT, messages_per_connection=messages)
    if messages == "0":
        assert "Too many messages sent" in opensmtpd.log


@pytest.mark.parametrize("messages", [10, 0])
async def test_opensmtpd_as_backup(
    opensmtpd: OpenSmtpdInstance, redis_url: str, redis_client: redis.Redis, messages: int
) -> None:
    """All copies are there at once."""
    limits = {"messages_per_connection": messages, "connections": 1}
    await deliver(opensmtpd.host, opensmtpd.port, redis_url, redis_client, COUNT, **limits)


async def test_exim_delivers_at_once(exim: EximInstance, redis_url: str, redis_client: redis.Redis) -> None:
    """It queues what comes after the tenth message of a connection for its queue runner: no connection has so many."""
    await send(exim.address, redis_url, 25)
    await deliver(exim.host, exim.port, redis_url, redis_client, 25, connections=1)
    exim.wait_for(50)
    assert "no immediate delivery" not in exim.log


@pytest.mark.postfix
async def test_postfix_slows_nobody_down_for_another(postfix: StartPostfix, redis_url: str) -> None:
    """It delays each reply after ten errors on a connection: the next client does not get that connection."""
    refuse = "check_recipient_access inline:{no@example.org=REJECT}, permit_mynetworks, reject"
    store = postfix(PostfixInstance.store(smtpd_recipient_restrictions=refuse))
    async with serve(settings_of(store.address), redis_url) as (_, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.say("MAIL FROM:<a@example.com>", 250)
            for _ in range(11):
                await client.say("RCPT TO:<no@example.org>", 554)
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.mail("a@example.com", "b@example.com")
    await until(lambda: store.log.count(" mail=1 ") == 2, message=lambda: store.log)  # a line at the end of each
