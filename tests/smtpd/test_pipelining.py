"""A client that pipelines: what it has sent goes ahead to the primary in one packet, and nothing else changes by that.

Every reply is the primary's own, in its place; what the primary or the client breaks off in the middle is neither lost
nor delivered twice; and the same dialogue, one command at a time, has the same replies and the same mail.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from loguru import logger

from relay.mail.reply import Reply
from relay.mail.reply import wire as octets_of
from relay.smtpd.protocol import ClientProtocol
from support.certificates import Certificate
from support.dialogue import AsyncDialogue, stuffed
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.product import Product
from support.reactions import Close, Delay, Gate, Moment, Reset, Silence
from support.redis_servers import RedisServer
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import PATIENCE, until

Make = Callable[..., Product]
Scripted = Callable[..., ScriptedServer]

MAIL = "MAIL FROM:<a@example.com>"
RCPT = "RCPT TO:<b@example.com>"
NEXT = ["MAIL FROM:<next@example.com>", "RCPT TO:<n@example.com>", "DATA"]
BODY = b"Subject: x\r\n\r\ntext\r\n.\r\n"


@pytest.fixture(autouse=True)
def no_session_errors() -> Iterator[None]:
    """Nothing here may surprise the relay."""
    found: list[str] = []
    sink = logger.add(lambda message: found.append(str(message)), filter=lambda r: r["message"] == "session error")
    yield
    logger.remove(sink)
    assert not found


def wire(lines: Iterable[str]) -> bytes:
    return b"".join(line.encode("utf-8", "surrogateescape") + b"\r\n" for line in lines)


async def hear(client: AsyncDialogue, count: int) -> list[str]:
    return [await client.reply() for _ in range(count)]


def begins(replies: Sequence[str], *wanted: str) -> bool:
    assert len(replies) == len(wanted)
    assert all(r.startswith(w) for r, w in zip(replies, wanted, strict=True)), replies
    return True


async def next_message(client: AsyncDialogue, *, reset: bool = False) -> None:
    """Send one more message, pipelined, in which nothing is refused."""
    lines = ["RSET"] * reset + NEXT
    await client.send(*lines)
    begins(await hear(client, len(lines)), *["250"] * (len(lines) - 1), "354")
    await client.raw(BODY)
    await client.expect(250)


def senders(server: ScriptedServer) -> list[str]:
    return [message.sender for message in server.messages]


# What leaves, and when


@both_loops
async def test_one_packet(primary: ScriptedServer, redis_url: str) -> None:
    """All up to DATA is at the primary before it has answered MAIL, in order; nothing behind DATA before its 354."""
    at_mail, at_data = Gate(), Gate()
    primary.replies |= {"MAIL": (at_mail, None), "DATA": (at_data, None)}
    body = wire(["RCPT TO:<evil@example.com>", "DATA"]) + BODY
    group = [MAIL + " SIZE=10", "rcpt to:<b@example.com>", "RCPT TO: <c@example.com>", "DATA"]
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.raw(wire(group) + body)  # RFC 2920 forbids the body there; it must do no harm
        await at_mail.arrival()
        sent = b"MAIL FROM:<a@example.com> SIZE=10\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<c@example.com>\r\nDATA\r\n"
        assert primary.connections[-1].received.endswith(b"\r\n" + sent)
        assert primary.commands[-1].startswith("MAIL")
        at_mail.open()
        await at_data.arrival()
        await client.expect(250)
        assert primary.connections[-1].received.endswith(sent)
        at_data.open()
        begins(await hear(client, 4), "250", "250", "354", "250")
    (message,) = primary.messages
    assert (message.recipients, message.content) == (["b@example.com", "c@example.com"], body[:-3])


@both_loops
async def test_without_pipelining(scripted: Scripted, redis_url: str) -> None:
    """A primary that does not offer PIPELINING gets one command at a time, and waits for no other."""
    primary = scripted(extensions=["SIZE"])
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.send(MAIL, RCPT, RCPT, "DATA")
        begins(await hear(client, 4), "250", "250", "250", "354")
        await client.raw(BODY)
        await client.expect(250)
        await next_message(client)
    assert not any(connection.pipelined for connection in primary.connections)
    assert senders(primary) == ["a@example.com", "next@example.com"]


@both_loops
async def test_one_command_at_a_time(primary: ScriptedServer, redis_url: str) -> None:
    """Of a client that waits for each reply nothing goes ahead, and nothing is made up."""
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.mail("a@example.com", "b@example.com")
    assert not any(connection.pipelined for connection in primary.connections)


@both_loops
async def test_who_it_is_goes_ahead_too(scripted: Scripted, redis_url: str) -> None:
    """XFORWARD, MAIL and what follows are one packet; behind XCLIENT and its EHLO too."""
    for extension, first in (("XFORWARD NAME ADDR", "XFORWARD ADDR=192.0.2.7\r\nMAIL"), ("XCLIENT ADDR", "MAIL")):
        at_mail = Gate()
        primary = scripted({"MAIL": [None, (at_mail, None), None]}, extensions=[*EXTENSIONS, extension])
        async with (
            serve(settings_of(primary.address), redis_url) as (_, port),
            await AsyncDialogue.open(port) as client,
        ):
            await client.hello()
            await next_message(client)
            await client.send("XFORWARD ADDR=192.0.2.7", MAIL, RCPT, "DATA")
            await at_mail.arrival()
            sent = f"{first} FROM:<a@example.com>\r\n{RCPT}\r\nDATA\r\n".encode()
            assert primary.connections[-1].received.endswith(sent)
            at_mail.open()
            begins(await hear(client, 4), "250", "250", "250", "354")
            await client.raw(BODY)
            await client.expect(250)
        assert senders(primary) == ["next@example.com", "a@example.com"]


@both_loops
async def test_chunks(scripted: Scripted, redis_url: str) -> None:
    """Recipients go ahead of BDAT, whose octets are read as a chunk and never looked at for commands."""
    primary, at_mail = scripted(extensions=[*EXTENSIONS, "CHUNKING"]), Gate()
    primary.replies["MAIL"] = [(at_mail, None), None]
    hidden = wire(NEXT) + b".\r\n"
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        bdat = b"BDAT %d LAST\r\n" % len(hidden) + hidden
        await client.raw(wire([MAIL, RCPT]) + bdat + wire([MAIL, RCPT]) + bdat)
        await at_mail.arrival()
        assert primary.connections[-1].received.endswith(wire([MAIL, RCPT]))
        at_mail.open()
        begins(await hear(client, 6), *["250"] * 6)
    assert [message.content for message in primary.messages] == [hidden, hidden]
    assert [c for c in primary.commands if "next" in c] == []


# What comes back


@both_loops
async def test_each_reply_is_the_primarys_own(primary: ScriptedServer, redis_url: str) -> None:
    """Every recipient has its own reply, in its place, texts and lines as they are; the refused one gets no mail."""
    primary.replies |= {
        "MAIL": "250-2.1.0 two\n250 lines",
        "RCPT TO:<b@": "251 2.1.5 b moved",
        "RCPT TO:<c@": "550 5.1.1 no c",
        "RCPT TO:<d@": "450-4.2.0 d\n450 later",
        ".": "250 2.6.0 kept as 1",
    }
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.send(MAIL, *(f"RCPT TO:<{name}@example.com>" for name in "bcde"), "DATA")
        assert (await hear(client, 6))[:5] == [
            "250-2.1.0 two\n250 lines",
            "251 2.1.5 b moved",
            "550 5.1.1 no c",
            "450-4.2.0 d\n450 later",
            "250 2.1.5 ok",
        ]
        await client.raw(BODY)
        assert await client.reply() == "250 2.6.0 kept as 1"
    (message,) = primary.messages
    assert message.recipients == ["b@example.com", "e@example.com"]


@both_loops
@pytest.mark.parametrize("answer", ["554 5.5.1 no valid recipients", "503 5.5.1 RCPT first", "451 4.3.0 no"])
async def test_no_recipient(primary: ScriptedServer, redis_url: str, answer: str) -> None:
    """With all recipients refused the client hears our 554; the next message has a connection without refusals."""
    primary.replies |= {"RCPT TO:<b": "550 5.1.1 unknown", "DATA": [answer, None]}
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.send(MAIL, RCPT, RCPT, "DATA")
        begins(await hear(client, 4), "250", "550 5.1.1 unknown", "550 5.1.1 unknown", "554 5.5.1 No valid recipients")
        await client.say("RCPT TO:<late@example.com>", "250 2.1.5 ok")
        await next_message(client, reset=True)
    assert senders(primary) == ["next@example.com"]
    assert len(primary.connections) == 2  # nobody inherits the refusals


@both_loops
@pytest.mark.parametrize("answer", ["354 go on", "250 what", "421 4.3.2 going down"])
async def test_no_recipient_and_a_go_ahead(primary: ScriptedServer, redis_url: str, answer: str) -> None:
    """A primary that wants a body for nobody is closed without an octet of one: the same 554, and the next is fine."""
    primary.replies |= {"RCPT TO:<b": "550 5.1.1 unknown", "DATA": [answer, None]}
    async with serve(settings_of(primary.address), redis_url) as (made, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.send(MAIL, RCPT, "DATA")
            begins(await hear(client, 3), "250", "550 5.1.1 unknown", "554 5.5.1 No valid recipients")
            await until(lambda: made.snapshot.primary.pool.in_use == 0)
            await client.say("RCPT TO:<late@example.com>", "451 4.4.2")
            await client.say("DATA", "554 5.5.1")
            await next_message(client, reset=True)
        await until(lambda: primary.connections[0].closed)
    assert senders(primary) == ["next@example.com"]
    assert primary.connections[0].received.endswith(b"DATA\r\n")
    assert len(primary.connections) == 2


@both_loops
@pytest.mark.parametrize("at_data", [None, "354 go", "250 what"])
async def test_mail_refused(primary: ScriptedServer, redis_url: str, at_data: str | None) -> None:
    """A refused MAIL has its own reply and 503 behind it; what went ahead comes to nothing, and the next is fine."""
    primary.replies |= {"MAIL": ["550 5.7.1 not you", None], "DATA": [at_data, None]}
    async with (
        serve(settings_of(primary.address), redis_url) as (made, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        assert (await hear(client, 3)) == ["550 5.7.1 not you", *["503 5.5.1 MAIL first"] * 2]
        assert made.snapshot.primary.pool.in_use == 0
        await next_message(client)
    assert senders(primary) == ["next@example.com"]
    assert len(primary.connections) == 2  # nobody inherits a refusal


@both_loops
async def test_mail_refused_slowly(primary: ScriptedServer, redis_url: str) -> None:
    """A primary that takes its time to refuse what went ahead does not keep the client from its reply for long."""
    primary.replies |= {"MAIL": "550 5.7.1 not you", "RCPT": (Delay(0.4), "503 5.5.1 no"), "RCPT TO:<z": Silence()}
    options = {
        "relay.timeout_seconds": "1",
        "relay.greeting_timeout_seconds": "1",
        "relay.command_timeout_seconds": "1",
    }
    async with (
        serve(settings_of(primary.address, options), redis_url) as (made, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        begun = time.monotonic()
        await client.send(MAIL, *[RCPT] * 30, "RCPT TO:<z@example.com>", "DATA")
        await client.expect("550 5.7.1 not you")
        assert time.monotonic() - begun < 9  # of the twelve that all refusals take
        await hear(client, 32)
        await until(lambda: made.snapshot.primary.pool.in_use == 0 == made.snapshot.primary.pool.idle)


@both_loops
@pytest.mark.parametrize("answer", ["451 4.3.0 not now", "550 5.7.1 never", "552-5.3.4 too\n552 much"])
async def test_data_refused(primary: ScriptedServer, redis_url: str, answer: str) -> None:
    """The primary's refusal of DATA is the client's; it was refused before any body, and the next message is taken."""
    primary.replies["DATA"] = [answer, None]
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        assert (await hear(client, 3)) == ["250 2.1.0 ok", "250 2.1.5 ok", answer]
        await next_message(client)
    assert senders(primary) == ["next@example.com"]
    assert len(primary.connections) == 2


# What we say ourselves

LONG = "RCPT TO:<" + "x" * 5000 + "@example.com>"
INTERRUPTIONS: dict[str, tuple[dict[str, str], list[str | bytes]]] = {
    "a domain that is not allowed": (
        {"smtp.allowed_domains": "example.com"},
        [RCPT, "RCPT TO:<b@elsewhere.example>", "RCPT TO:<b%elsewhere.example@example.com>", RCPT],
    ),
    "too many": ({"smtp.max_recipients": "2"}, [RCPT] * 4),
    "too many but one is refused": ({"smtp.max_recipients": "2"}, ["RCPT TO:<no@example.com>", *[RCPT] * 3]),
    "no address": ({}, [RCPT, "RCPT TO:<>", RCPT]),
    "no syntax": ({}, [RCPT, "RCPT FOR:<b@example.com>", "RCPT", RCPT]),
    "a parameter not offered": ({}, [RCPT, "RCPT TO:<c@example.com> NOTIFY=NEVER", RCPT]),
    "a control character": ({}, [RCPT, "RCPT TO:<b\0@example.com>", "RCPT TO:<b\r@example.com>", RCPT]),
    "a long line": ({}, [RCPT, LONG, RCPT]),
    "a very long line": ({}, [RCPT, "RCPT TO:<" + "x" * 70_000, RCPT]),
    "a bare newline": ({}, [RCPT, b"RCPT TO:<c@example.com>\nRCPT TO:<d@example.com>\r\r\n" + wire([RCPT])[:-2]]),
    "a bare newline refused": ({"smtp.bare_newline": "refuse"}, [RCPT, b"RCPT TO:<c@example.com>\n" + RCPT.encode()]),
    "other commands": ({}, [RCPT, "NOOP", "VRFY b", RCPT, "HELP", "FOO", "MAIL FROM:<x@example.com>", RCPT]),
    "data with a word": ({}, [RCPT, "DATA now", RCPT, "D ATA", ""]),
    "reset": ({}, [RCPT, "RSET", MAIL, RCPT]),
    "ehlo": ({}, [RCPT, "EHLO again", MAIL, RCPT]),
    "none at all": ({}, []),
    "utf-8": ({}, ["RCPT TO:<\u00fc@example.com>", "RCPT TO:<\udcff@example.com>", 'RCPT TO:<"a b>"@example.com>']),
}


@both_loops
@pytest.mark.parametrize("name", INTERRUPTIONS)
async def test_interrupted(primary: ScriptedServer, redis_url: str, name: str) -> None:
    """What we do not pass on, in the middle of what goes ahead, changes no reply and no recipient; only our own 5xx."""
    options, middle = INTERRUPTIONS[name]
    primary.replies["RCPT TO:<no@"] = "550 5.1.1 no"
    heard = []
    async with serve(settings_of(primary.address, options), redis_url) as (_, port):
        lines = [line if isinstance(line, bytes) else wire([line])[:-2] for line in [MAIL, *middle, "DATA"]]
        octets = b"".join(line + b"\r\n" for line in lines)
        for pieces in (re.findall(rb"[^\n]*\n", octets), [octets]):
            async with await AsyncDialogue.open(port) as client:
                await client.hello()
                replies: list[str] = []
                for piece in pieces:
                    await client.raw(piece)
                    replies += await hear(client, piece.count(b"\n"))
                if replies[-1].startswith("354"):
                    await client.raw(BODY)
                    await client.expect(250)
                await client.quit()
                heard.append(replies)
        received = [(t.sender, t.recipients, t.content) for t in primary.messages]
    assert heard[0] == heard[1]
    assert len(received) == 2 * heard[0][-1].startswith("354")
    assert received[:1] == received[1:]
    assert not [c for c in primary.commands if "elsewhere" in c or "FOO" in c]
    assert middle or "DATA" not in primary.commands


@both_loops
async def test_an_lmtp_primary(scripted: Scripted, redis_url: str) -> None:
    """One recipient at a time for LMTP, as always; the first goes ahead, the second is told 452 by us."""
    primary = scripted(lmtp=True)
    async with (
        serve(settings_of(f"lmtp://{primary.address}"), redis_url) as (_, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        await client.send(MAIL, RCPT, "RCPT TO:<c@example.com>", "DATA")
        begins(await hear(client, 4), "250", "250", "452 4.5.3", "354")
        await client.raw(BODY)
        await client.expect(250)
        await next_message(client)
    assert [message.recipients for message in primary.messages] == [["b@example.com"], ["n@example.com"]]
    assert not [command for command in primary.commands if "<c@" in command]


@both_loops
async def test_too_much_mail_at_once(primary: ScriptedServer, redis_url: str) -> None:
    """When there is no room for a message any more by its DATA, which went ahead: 452, no octet of it, and no harm."""
    at_rcpt = Gate()
    primary.replies["RCPT"] = [(at_rcpt, None), None]
    async with serve(settings_of(primary.address), redis_url) as (made, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.send(MAIL, RCPT, "DATA")
            await at_rcpt.arrival()
            made.counters.add_octets(1 << 40)
            at_rcpt.open()
            begins(await hear(client, 3), "250", "250", "452 4.3.1")
            made.counters.add_octets(-(1 << 40))
            await client.say(RCPT, "451 4.4.2")
            await client.say("DATA", "451 4.4.2")
            await next_message(client)
        await until(lambda: made.snapshot.primary.pool.in_use == 0)
    assert senders(primary) == ["next@example.com"]


@both_loops
@pytest.mark.parametrize("behind", ["RSET", "QUIT", "QUIT\r\nNOOP", "EHLO x", "HELO x"])
async def test_given_up(primary: ScriptedServer, redis_url: str, behind: str) -> None:
    """A transaction that its client gives up in the same packet is no mail, and the connection is kept."""
    async with serve(settings_of(primary.address), redis_url) as (made, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.send(MAIL, RCPT, behind)
            begins(await hear(client, 3), "250", "250", "221" if behind.startswith("QUIT") else "250")
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await next_message(client)
        await until(lambda: made.snapshot.primary.pool.in_use == 0)
    assert senders(primary) == ["next@example.com"]
    assert len(primary.connections) == 1


# Broken off


@both_loops
@pytest.mark.parametrize("ending", [Close(), Reset(), ("421 4.3.2 going down", Close()), "421 4.3.2 no more"],
                         ids=["close", "reset", "421 and close", "421"])  # fmt: skip
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "RCPT TO:<b", "RCPT TO:<c", "DATA", "."])
async def test_the_primary_goes(primary: ScriptedServer, redis_url: str, stage: str, ending: Any) -> None:
    """Wherever the primary goes the client hears 451, and nothing is mail; then all is well again."""
    async with serve(settings_of(primary.address), redis_url) as (made, port):
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await until(lambda: made.snapshot.primary.pool.idle == 1)
            primary.drop()
            await until(lambda: not made.snapshot.primary.pool._idle[0].is_open)
            primary.replies[stage] = ending
            await client.send(MAIL, RCPT, "RCPT TO:<c@example.com>", "DATA")
            replies = await hear(client, 4)
            if stage == ".":
                await client.raw(BODY)
                replies += await hear(client, 1)
            place = {"CONNECT": 0, "EHLO": 0, "MAIL": 0, "RCPT TO:<b": 1, "RCPT TO:<c": 2, "DATA": 3, ".": 4}[stage]
            assert all(reply.startswith(("250", "354")) for reply in replies[:place])
            assert replies[place].startswith("451 4.")
            assert not any(reply.startswith("2") for reply in replies[place:])
            assert not primary.messages
            primary.replies.clear()
            await next_message(client, reset=True)
        await until(lambda: made.snapshot.primary.pool.in_use == 0)
    assert senders(primary) == ["next@example.com"]


@both_loops
@pytest.mark.parametrize("ending", [Close(), Reset(), ("421 4.3.2 idle for too long", Close())])
async def test_a_kept_connection_that_is_dead(primary: ScriptedServer, redis_url: str, ending: Any) -> None:
    """A kept connection that dies of the first packet is replaced unseen, and all of that packet goes to the other."""
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await next_message(client)
        primary.replies["MAIL"] = [ending, None]
        await client.send(MAIL, RCPT, "DATA")
        begins(await hear(client, 3), "250", "250", "354")
        await client.raw(BODY)
        await client.expect(250)
    assert senders(primary) == ["next@example.com", "a@example.com"]
    assert wire([MAIL, RCPT, "DATA"]) + primary.messages[1].wire + b".\r\n" in primary.connections[1].received


@both_loops
@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
@pytest.mark.parametrize("stage", ["MAIL", "RCPT", "DATA"])
async def test_the_client_goes(primary: ScriptedServer, redis_url: str, stage: str, way: str) -> None:
    """A client that goes with commands ahead leaves nothing behind: no mail, no lease, no octet in a DATA phase."""
    gate = Gate()
    primary.replies[stage] = [(gate, None), None]
    async with serve(settings_of(primary.address), redis_url) as (made, port):
        client = await AsyncDialogue.open(port)
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        await gate.arrival()
        if way == "reset":
            client.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        if way == "half-close":
            client.writer.write_eof()
        else:
            client.writer.close()
        gate.open()
        await until(lambda: not made.command_loops)
        assert (made.counters.clients, made.counters.octets, made.snapshot.primary.pool.in_use) == (0, 0, 0)
        client.writer.close()
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await next_message(client)
    assert senders(primary) == ["next@example.com"]
    assert primary.connections[0].received.endswith(b"DATA\r\n")


@both_loops
async def test_shutdown(primary: ScriptedServer, redis_url: str) -> None:
    """A relay that is stopped while commands are ahead finishes this message, and takes no other."""
    gate = Gate()
    primary.replies["MAIL"] = (gate, None)
    async with (
        serve(settings_of(primary.address), redis_url) as (made, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        await gate.arrival()
        made.stopping = True
        for command_loop in made.command_loops:
            command_loop.stop(impatient=False)
        gate.open()
        begins(await hear(client, 3), "250", "250", "354")
        for command_loop in made.command_loops:
            command_loop.stop(impatient=False)
        await client.raw(BODY + wire(NEXT))
        begins(await hear(client, 2), "250", "421 4.3.2")
        assert await client.is_closed()
    assert senders(primary) == ["a@example.com"]


@both_loops
async def test_only_waiting_counts(primary: ScriptedServer, redis_url: str) -> None:
    """The client's time does not run while the primary takes its own, however much longer that is."""
    primary.replies |= {"MAIL": (Delay(1.5), None), "DATA": (Delay(1.5), None)}
    options = {"smtp.idle_timeout": "1", "smtp.lease_idle_timeout": "1"}
    async with (
        serve(settings_of(primary.address, options), redis_url) as (_, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        begins(await hear(client, 3), "250", "250", "354")
        await client.raw(BODY)
        await client.expect(250)
        assert (await client.reply()).startswith("421 4.4.2")


@both_loops
async def test_in_time_or_not(primary: ScriptedServer, redis_url: str) -> None:
    """The end of a message that comes just when its time is over is either too late or not: never taken *and* 421."""
    options = {"smtp.idle_timeout": "1", "smtp.lease_idle_timeout": "1"}
    async with (
        serve(settings_of(primary.address, options), redis_url) as (made, port),
        await AsyncDialogue.open(port) as client,
    ):
        await client.hello()
        await client.send(MAIL, RCPT, "DATA")
        begins(await hear(client, 3), "250", "250", "354")
        await client.raw(BODY[:-1])
        (command_loop,) = made.command_loops
        await until(lambda: command_loop._protocol.waiting and command_loop._protocol.read_buffer.data == b"")
        client.writer.write(BODY[-1:])
        time.sleep(1.5)  # on purpose: the loop stands still, so that deadline and octets come in one turn of it
        reply = await client.reply()
        await until(lambda: made.snapshot.primary.pool.in_use == 0)
        await client.close()
        await until(lambda: not made.command_loops)
    assert reply.startswith("250") == (len(primary.messages) == 1)
    assert reply.startswith(("250", "421 4.4.2"))


# Much at once


@both_loops
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_very_many_recipients(
    scripted: Scripted, redis_url: str, certificate: Certificate, tls: bool
) -> None:  # fmt: skip
    """Far more than is read ahead, and the end of input behind it: each has its reply, none is lost, nothing hangs."""
    gate = Gate()
    primary = scripted({"MAIL": (gate, None)})
    options = {"smtp.max_recipients": "9999", "smtp.tls_certificate": str(certificate.certificate)}
    options |= {"smtp.tls_key": str(certificate.key)}
    recipients = [f"{'x' * 200}{n}@example.com" for n in range(2000)]
    async with serve(settings_of(primary.address, options), redis_url, tls=tls) as (made, port):
        secure: dict[str, Any] = {"ssl": certificate.client_context(), "server_hostname": "localhost"} if tls else {}
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22, **secure)
        client = AsyncDialogue(reader, writer, PATIENCE)
        await client.expect(220)
        await client.hello()
        writer.write(wire([MAIL, *(f"RCPT TO:<{r}>" for r in recipients), "DATA"]) + BODY + b"QUIT\r\n")
        await gate.arrival()
        (command_loop,) = made.command_loops
        await until(lambda: len(command_loop._protocol.read_buffer.data) > 100_000)
        if not tls:
            writer.write_eof()
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(command_loop._protocol.read_buffer.data) < 500_000
        gate.open()
        begins(await hear(client, len(recipients) + 4), *["250"] * (len(recipients) + 1), "354", "250", "221")
        await client.close()
        await until(lambda: not made.command_loops)
    assert primary.messages[0].recipients == recipients


@both_loops
async def test_much_behind_a_handshake(scripted: Scripted, redis_url: str, certificate: Certificate) -> None:
    """A client that sends all it has in the packets that end the handshake is heard to the end."""
    primary = scripted()
    options = {"smtp.max_recipients": "9999", "smtp.tls_certificate": str(certificate.certificate)}
    options |= {"smtp.tls_key": str(certificate.key)}
    said = wire(["EHLO x", MAIL, *[f"RCPT TO:<{'x' * 200}{n}@example.com>" for n in range(2000)], "DATA"])
    async with serve(settings_of(primary.address, options), redis_url, tls=True) as (made, port):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificate.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        heard, done = b"", False
        while b"\r\n221 " not in heard:
            try:
                if not done:
                    tls.do_handshake()
                    done = True
                    tls.write(said + BODY + b"QUIT\r\n")
                    writer.write(outgoing.read())
                while octets := tls.read(65536):
                    heard += octets
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
                octets = await asyncio.wait_for(reader.read(65536), PATIENCE)
                assert octets, heard[-100:]
                incoming.write(octets)
        writer.close()
        await until(lambda: not made.command_loops)
    assert heard.count(b"\r\n250 2.1.5 ok") == 2000
    assert len(primary.messages) == 1


@both_loops
async def test_injected_before_tls(primary: ScriptedServer, redis_url: str, certificate: Certificate) -> None:
    """What comes in plain text behind STARTTLS is forgotten (RFC 3207 4.2)."""
    options = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
    async with serve(settings_of(primary.address, options), redis_url) as (_, port):
        for injected in (wire([MAIL, RCPT, "DATA"]), wire([MAIL, *[RCPT] * 90, "DATA"]), wire(["NOOP"] * 10)):
            async with await AsyncDialogue.open(port) as client:
                await client.hello()
                await client.raw(b"STARTTLS\r\n" + injected)
                await client.expect(220)
                await client.writer.start_tls(certificate.client_context(), server_hostname="localhost")
                await client.hello()
                await next_message(client)
    assert set(senders(primary)) == {"next@example.com"}
    assert not [command for command in primary.commands if "<a@" in command]


@both_loops
async def test_a_client_that_never_reads(primary: ScriptedServer, redis_url: str) -> None:
    """A client that pipelines and reads no reply is cut off in time, and until then little is kept for it."""
    primary.replies["MAIL"] = "550 5.7.1 not you"  # what follows is no bad manners then
    options = {"smtp.idle_timeout": "1", "smtp.lease_idle_timeout": "1"}
    most = 0
    async with serve(settings_of(primary.address, options), redis_url) as (made, port):
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, wire(["EHLO x", MAIL]))
            await until(lambda: made.command_loops)
            (command_loop,) = made.command_loops
            protocol = command_loop._protocol
            flood = loop.create_task(loop.sock_sendall(client, b"RCPT TO:<b@x>\r\n" * 4_000_000))
            while made.command_loops and not flood.done():
                held = sum(map(len, protocol._held))
                waiting = protocol.transport.get_write_buffer_size() if protocol.transport else 0
                most = max(most, held + waiting + len(protocol.read_buffer.data))
                await asyncio.sleep(0)
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(flood, PATIENCE)
        await until(lambda: not made.command_loops)
    assert 0 < most < 1_000_000


class Wire(asyncio.Transport):
    """A connection of which each write is noted; it takes so many octets, then it is full."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.room = room

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return max(0, sum(map(len, self.writes)) - self.room)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        self.room = 0

    def pause_reading(self) -> None:
        """Nothing comes by itself."""

    resume_reading = pause_reading


@pytest.mark.parametrize(("lines", "room", "writes"), [(50, 1 << 20, 1), (1000, 1 << 20, 10), (1000, 3000, 600)])
def test_replies_leave_together(lines: int, room: int, writes: int) -> None:
    """Replies to commands that came together are one write, up to a hundred; a client that does not read gets single
    ones, for which we wait."""
    ok = Reply.of(250, "2.0.0 Ok")

    async def run(protocol: ClientProtocol) -> None:
        while await protocol.read_line(60, 1000):
            await protocol.push(ok)
        await protocol.push(Reply.of(221, "2.0.0 Bye"))

    async def talk() -> list[bytes]:
        protocol, transport = ClientProtocol(run, write_seconds=60), Wire(room)
        protocol.connection_made(transport)
        protocol.data_received(b"NOOP\r\n" * lines)
        for _ in range(5):
            await asyncio.sleep(0)
        before = list(transport.writes)
        protocol.eof_received()
        await protocol._command_loop
        assert b"".join(transport.writes) == octets_of(ok) * lines + b"221 2.0.0 Bye\r\n"
        return before

    found = asyncio.run(talk())
    assert b"".join(found) == octets_of(ok) * lines, "a reply was held while nothing came"
    assert writes <= len(found) <= (writes if room > 3000 else lines)


# Smuggling


@both_loops
async def test_behind_the_dot(primary: ScriptedServer, redis_url: str) -> None:
    """The next message in the packet of the dot goes ahead again; commands in a body are text, and never looked at."""
    at_mail = Gate()
    primary.replies["MAIL FROM:<next@"] = (at_mail, None)
    hidden = b"Subject: x\r\n\r\n.\n" + wire(["MAIL FROM:<evil@example.com>", "RCPT TO:<evil@example.com>", "DATA"])
    tail = b"evil\r\n..\r\n"
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.raw(wire([MAIL, RCPT, "DATA"]) + hidden + tail + b".\r\n" + wire(NEXT) + hidden + tail + b".\r\n")
        begins([await client.reply() for _ in range(4)], "250", "250", "354", "250")
        await at_mail.arrival()
        received = bytes(primary.connections[-1].received)
        assert received.endswith(b"\r\n.\r\n" + wire(NEXT)), received[-300:]
        at_mail.open()
        begins(await hear(client, 4), "250", "250", "354", "250")
    assert senders(primary) == ["a@example.com", "next@example.com"]
    assert not [command for command in primary.commands if "evil" in command]
    assert {bytes(message.content) for message in primary.messages} == {(hidden.replace(b".\n", b"..\r\n") + tail)
                                                                        .replace(b"\r\n..", b"\r\n.")}  # fmt: skip


@both_loops
async def test_an_octet_at_a_time(primary: ScriptedServer, redis_url: str) -> None:
    """A client whose packets are single octets is served like any other."""
    async with serve(settings_of(primary.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        for octet in wire([MAIL, RCPT, "DATA"]) + BODY + wire(NEXT) + BODY:
            client.writer.write(bytes([octet]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        begins(await hear(client, 8), *["250", "250", "354", "250"] * 2)
    assert senders(primary) == ["a@example.com", "next@example.com"]


# The same as one command at a time


@dataclass(frozen=True)
class Group:
    """What a client says up to DATA, and the body that it has for a 354."""

    lines: tuple[str, ...]
    body: bytes


SENDERS = st.sampled_from(["ok", "ok", "ok", "refused", "later", "nodata", "nodata-later", "spam", "eager", ""])
RECIPIENTS = st.sampled_from(["b", "c", "d", "refused", "refused", "later", "two-lines"])
RCPTS = RECIPIENTS.map(lambda name: f"RCPT TO:<{name}@example.com>")
ODD = st.sampled_from(["NOOP", "VRFY b", "rcpt to:<b@example.com>", "RCPT TO:<>", "RCPT TO:<b@example.com> FOO=1",
                       "RCPT TO:<b@elsewhere.example>", "RSET", "DATA x", "MAIL FROM:<again@example.com>"])  # fmt: skip
MIDDLE = st.lists(st.one_of(RCPTS, RCPTS, RCPTS, RCPTS, ODD), max_size=6)
TEXT = st.lists(st.sampled_from([b"x", b".", b"\r\n", b"\r\n.", b"DATA\r\n", b"MAIL FROM:<evil@example.com>\r\n",
                                 b"RCPT TO:<b@example.com>\r\n", b"\r\n\r\n"]), max_size=8).map(b"".join)  # fmt: skip
# Three: twenty bad commands end a session.
GROUPS = st.lists(st.tuples(SENDERS, MIDDLE, TEXT), min_size=1, max_size=3)
CUTS = st.one_of(st.just(()), st.lists(st.integers(0, 400), max_size=8).map(tuple))


def scripted_by_sender(moment: Moment) -> str | None:
    """Answer DATA, or the dot, as the transaction's sender says."""
    transactions = moment.connection.transactions
    sender = transactions[-1].sender if transactions else ""
    if moment.line == ".":
        return "550 5.7.1 spam" if sender.startswith("spam") else None
    if sender.startswith("eager"):
        return "354 whoever it is for"
    return {"nodata@example.com": "550 5.7.1 no data", "nodata-later@example.com": "451 4.3.0 later"}.get(sender)


@dataclass(frozen=True)
class Pair:
    """A relay between two servers."""

    product: Product
    primary: ScriptedServer
    backup: ScriptedServer

    def converse(self, groups: list[Group], cuts: Sequence[int] | None) -> tuple[list[str], list[Any]]:
        """Say all groups; ``cuts`` None is one command at a time. Returns the replies, and the mail at the primary."""
        before = len(self.primary.messages)
        replies, body = [], b""
        with self.product.dialogue() as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.hello()
            for group in [*groups, Group(("RSET", "QUIT"), b"")]:
                if cuts is None:
                    if body:
                        client.raw(body)
                        replies.append(client.reply())
                    replies += [client.say(line) for line in group.lines]
                else:
                    data = body + wire(group.lines)
                    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
                    for start, end in itertools.pairwise(edges):
                        client.raw(data[start:end])
                    replies += [client.reply() for _ in range(len(group.lines) + bool(body))]
                body = stuffed(group.body) if replies[-1].startswith("354") else b""
        mail = self.primary.messages[before:]
        return replies, [(t.sender, tuple(t.recipients), t.content) for t in mail]


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A relay that runs for all examples."""
    with contextlib.ExitStack() as ends:
        primary = ends.enter_context(ScriptedServer({
            "MAIL FROM:<refused": "550 5.7.1 not you",
            "MAIL FROM:<later": "451 4.3.0 later",
            "RCPT TO:<refused": "550 5.1.1 unknown",
            "RCPT TO:<later": "450 4.2.0 later",
            "RCPT TO:<two-lines": "250-2.1.5 two\n250 lines",
            "DATA": scripted_by_sender,
            ".": scripted_by_sender,
        }))  # fmt: skip
        backup = ends.enter_context(ScriptedServer())
        with redis_server.client() as client:
            client.flushall()
        product = Product(
            tmp_path_factory.mktemp("ahead"),
            primary=primary.address,
            backups=[backup.address],
            redis_url=redis_server.url,
            settings={
                "smtp.allowed_domains": "example.com",
                "relay.timeout_seconds": "5",
                "relay.greeting_timeout_seconds": "1",
                "relay.command_timeout_seconds": "1",
            },
        )
        yield Pair(ends.enter_context(product), primary, backup)
        assert '"session error"' not in product.log


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)
@given(GROUPS, CUTS)
def test_the_same_dialogue(pair: Pair, given_: list[tuple[str, list[str], bytes]], cuts: tuple[int, ...]) -> None:
    """However a pipelined dialogue is cut into packets, replies and mail are those of one command at a time."""
    groups = [
        Group(("RSET", f"MAIL FROM:<{f'{sender}@example.com' if sender else ''}>", *middle, "DATA"), body)
        for sender, middle, body in given_
    ]
    assert pair.converse(groups, cuts) == pair.converse(groups, None)


def test_the_same_at_the_backup(pair: Pair) -> None:
    """The copies of all these dialogues, and of some more, are what the primary took, recipient by recipient."""
    middle = ["RCPT TO:<b@example.com>", "RCPT TO:<refused@example.com>", "RCPT TO:<c@example.com>"]
    groups = [Group((f"MAIL FROM:<{n}@example.com>", *middle, "DATA"), b"%d\r\n.dot\r\n" % n) for n in range(20)]
    _, mail = pair.converse(groups, ())
    assert [(sender, recipients) for sender, recipients, _ in mail] == [
        (f"{n}@example.com", ("b@example.com", "c@example.com")) for n in range(20)
    ]
    count = len(pair.primary.messages)
    pair.backup.wait_for(count)
    at_primary, at_backup = (
        Counter((t.sender, tuple(t.recipients), t.wire) for t in server.messages)
        for server in (pair.primary, pair.backup)
    )
    assert at_primary == at_backup
