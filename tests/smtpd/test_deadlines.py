"""A primary that is slow is not one that is dead: each has its own deadline (RFC 5321 4.5.3.2)."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from relay.config.loader import load
from relay.mail.timeouts import MAIL_SECONDS, Timeouts
from support.dialogue import AsyncDialogue
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.reactions import Delay, Gate, Silence
from support.scripted_server import ScriptedServer
from support.waiting import until

Scripted = Callable[..., ScriptedServer]

BRIEF = 0.3  # for a host that is dead
SLOW = Delay(3 * BRIEF)
SOON = 15.0  # seconds, on a busy machine; what lasts too long lasts twice that
PATIENT = {
    "relay.timeout_seconds": str(BRIEF),
    "relay.greeting_timeout_seconds": "30",
    "relay.command_timeout_seconds": "30",
}


@pytest.fixture
def blackhole() -> Iterator[int]:
    """A port that answers no SYN: the queue of its listener is full, as a firewall drops them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
            fillers.append(filler)
        yield listener.getsockname()[1]
        for filler in fillers:
            filler.close()


@both_loops
@pytest.mark.parametrize("key", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA"])
async def test_slow_servers_get_their_mail(redis_url: str, scripted: Scripted, key: str) -> None:
    """Whatever it takes its time for, longer than a dead host is waited for, the message is delivered."""
    primary = scripted({key: (SLOW, None)})
    async with serve(settings_of(primary.address, PATIENT), redis_url) as (_, port):
        client = await AsyncDialogue.open(port)
        await client.hello()
        assert (await client.mail("a@example.com", "b@example.com", data=b"Subject: x\r\n\r\n")).startswith("250")
        await client.close()
    assert len(primary.messages) == 1


async def test_hello_does_not_wait_for_a_slow_greeting(redis_url: str, scripted: Scripted) -> None:
    """A client hears EHLO's reply after the wait for a dead host at the latest, with what every primary takes."""
    primary = scripted({"CONNECT": (Delay(100 * BRIEF), None)})
    async with serve(settings_of(primary.address, PATIENT), redis_url) as (_, port):
        client = await AsyncDialogue.open(port)
        begun = time.monotonic()
        await client.hello()
        assert time.monotonic() - begun < SOON
        await client.close()
        primary.drop()


async def test_a_dead_host_fails_soon(redis_url: str, blackhole: int) -> None:
    """A host that takes no connection is given up after relay.timeout_seconds, whatever else may last."""
    async with serve(settings_of(f"127.0.0.1:{blackhole}", PATIENT), redis_url) as (_, port):
        client = await AsyncDialogue.open(port)
        begun = time.monotonic()
        await client.hello()
        assert (await client.say("MAIL FROM:<a@example.com>")).startswith("451 4.4.1")
        assert time.monotonic() - begun < SOON
        await client.close()


async def test_a_kept_connection_that_died_in_silence(redis_url: str, scripted: Scripted) -> None:
    """One that does not answer MAIL as fast as a new one could be made is replaced unseen."""
    primary = scripted()
    async with serve(settings_of(primary.address, PATIENT), redis_url) as (_, port):
        client = await AsyncDialogue.open(port)
        await client.hello()
        await client.mail("a@example.com", "b@example.com", data=b"Subject: x\r\n\r\n")
        primary.replies["MAIL"] = [Silence(), None]
        begun = time.monotonic()
        await client.mail("a@example.com", "b@example.com", data=b"Subject: x\r\n\r\n")
        assert time.monotonic() - begun < SOON
        await client.close()
    assert len(primary.messages) == 2


@pytest.mark.parametrize("silent", ["CONNECT", "EHLO", "MAIL"])
async def test_every_wait_has_an_end(redis_url: str, scripted: Scripted, silent: str) -> None:
    """A server that never answers is 451 when its own deadline has passed."""
    primary = scripted({silent: Silence()})
    short = PATIENT | {"relay.greeting_timeout_seconds": "0.6", "relay.command_timeout_seconds": "0.6"}
    async with serve(settings_of(primary.address, short), redis_url) as (_, port):
        client = await AsyncDialogue.open(port)
        await client.hello()
        async with asyncio.timeout(10):
            assert (await client.say("MAIL FROM:<a@example.com>")).startswith("451 4.4.1")
        await client.close()
        primary.drop()


def test_the_defaults_fit_into_the_patience_of_clients() -> None:
    """A dead host keeps its 10 s; MAIL is answered before Postfix hangs up; who said minutes for all gets them."""
    timeouts = load({"relay.destination_primary": "old.example.com"}, {}, ()).relay.timeouts
    assert timeouts == Timeouts(10, 60, 120)
    assert timeouts.session + timeouts.connect < MAIL_SECONDS < 300
    slow = load({"relay.destination_primary": "old.example.com", "relay.timeout_seconds": "3m"}, {}, ()).relay.timeouts
    assert slow == Timeouts.of(180)


@both_loops
async def test_what_came_before_a_reset_is_dropped(redis_url: str, scripted: Scripted) -> None:
    """The primary is asked no more on behalf of a client that can hear no answer; nothing stays counted."""
    gate = Gate()
    primary = scripted({"MAIL": (gate, None)})
    async with serve(settings_of(primary.address, PATIENT), redis_url) as (context, port):
        client = await AsyncDialogue.open(port)
        await client.hello()
        await client.raw(b"MAIL FROM:<a@example.com>\r\nRSET\r\n" * 3000)
        await gate.arrival()
        assert context.counters.octets > 50_000
        sock = client.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.writer.transport.abort()
        await until(lambda: context.counters.octets < 20_000)
        gate.open()
        await until(lambda: not context.command_loops)
        assert context.counters.octets == 0
    assert sum(line.startswith("MAIL") for line in primary.commands) == 1
