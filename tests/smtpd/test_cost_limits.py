"""What strangers may cost: commands, log lines, passwords and memory have an end, and lawful clients do not meet it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import socket
import struct
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.passwords import hash_password
from relay.smtpd.shared_counters import ProcessCounters
from support.dialogue import AsyncDialogue
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import until, wait_until

Make = Callable[..., Product]

HELLO = b"EHLO x\r\n"
OPEN = HELLO + b"MAIL FROM:<a@example.com>\r\n"
REFUSED = HELLO + b"MAIL FROM:<a@example.com> SIZE=999999999999\r\n"
CHUNK = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n"
MESSAGE = CHUNK + b"DATA\r\n"
STORMS = {
    "NOOP": (HELLO, b"NOOP\r\n"),
    "RSET": (HELLO, b"RSET\r\n"),
    "VRFY": (HELLO, b"VRFY x\r\n"),
    "HELP": (HELLO, b"HELP\r\n"),
    "EHLO": (HELLO, b"EHLO x\r\n"),
    "AUTH of an unknown kind": (HELLO, b"AUTH NTLM\r\n"),
    "MAIL too large": (HELLO, b"MAIL FROM:<a@example.com> SIZE=999999999999\r\n"),
    "MAIL and RSET": (HELLO, b"MAIL FROM:<a@example.com>\r\nRSET\r\n"),
    "DATA without recipients": (OPEN, b"DATA\r\n"),
    "RCPT behind a refused MAIL": (REFUSED, b"RCPT TO:<b@example.com>\r\n"),
    "DATA behind a refused MAIL": (REFUSED, b"DATA\r\n"),
    "refused RCPT": (OPEN, b"RCPT TO:<bad@example.com>\r\n"),
    "BDAT 0": (OPEN + b"RCPT TO:<b@example.com>\r\n", b"BDAT 0\r\n"),
    "messages that are refused": (HELLO, MESSAGE + b"a\nb\r\n.\r\n"),
    "messages by BDAT that are refused": (HELLO, CHUNK + b"BDAT 3 LAST\r\na\nb"),
    "BDAT without MAIL": (HELLO, b"BDAT 0 LAST\r\n"),
}  # fmt: skip


@pytest.fixture
def chunking(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    return scripted({"RCPT TO:<bad@example.com>": "550 5.1.1 no"}, extensions=[*EXTENSIONS, "CHUNKING"])


@both_loops
async def test_storms(chunking: ScriptedServer, redis_url: str, tmp_path: Path) -> None:
    """Whatever brings no message ends with 421, after some thousand commands at the most."""
    users = tmp_path / "users"
    users.write_text("")
    settings = {"smtp.users_file": str(users), "smtp.auth_without_tls": "true", "smtp.bare_newline": "refuse"}
    async with serve(settings_of(chunking.address, settings), redis_url) as (made, port):
        for name, (first, unit) in STORMS.items():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def flood(writer: asyncio.StreamWriter = writer, first: bytes = first, unit: bytes = unit) -> None:
                with contextlib.suppress(OSError):
                    writer.write(first)
                    for _ in range(100):
                        writer.write(unit * 50)
                        await writer.drain()

            flooding = asyncio.create_task(flood())
            heard = b""
            with contextlib.suppress(OSError):
                async with asyncio.timeout(20):
                    while piece := await reader.read(65536):
                        heard += piece
            await flooding
            writer.close()
            assert heard.count(b"\n") < 1300, name
            assert not heard or heard.count(b"\n") > 20, name
            await until(lambda: not made.command_loops)
            await until(lambda: (made.counters.clients, made.counters.octets) == (0, 0))  # a turn of the loop later


def test_the_log_has_an_end(product: Make, primary: ScriptedServer) -> None:
    """A thousand refused recipients are a hundred lines, and one that says how many more there were."""
    primary.replies["RCPT"] = "550 5.1.1 no"
    house = product(primary=primary.address, backups=["127.0.0.1:9"])
    with house.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.raw(b"RCPT TO:<x@example.com>\r\n" * 900)
        for _ in range(900):
            client.expect(550)
        client.quit()
    house.wait_for_log("more commands refused")
    events = [event for event in house.events if event["event"].endswith("refused")]
    assert len(events) == 101
    assert events[-1]["count"] == 800


def test_lawful_clients(product: Make, primary: ScriptedServer) -> None:
    """Two hundred messages on a connection, each with refused recipients and commands between, meet no limit."""
    primary.replies["RCPT TO:<bad@example.com>"] = "550 5.1.1 no"
    house = product(primary=primary.address, backups=["127.0.0.1:9"])
    with house.dialogue() as client:
        client.hello()
        for _ in range(200):
            client.say("NOOP", 250)
            client.say("RSET", 250)
            client.say("MAIL FROM:<a@example.com>", 250)
            for _ in range(10):
                client.say("RCPT TO:<bad@example.com>", 550)
            client.say("RCPT TO:<b@example.com>", 250)
            client.body(b"Subject: x\r\n\r\n")
        client.quit()


def test_a_slow_pace_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks now and then how we are may go on for ever; who asks at once may not."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patient, hasty = ErrorLimits(), ErrorLimits()
    for _ in range(10_000):
        now[0] += 10
        patient.idle()
    for _ in range(130):
        hasty.idle()
    assert not patient.are_unbearable
    assert hasty.are_unbearable


def test_what_drains_beside_us_counts() -> None:
    """Each process at one place has a seat of its own: who takes one starts with zeros there, and all are added up."""
    counters = ProcessCounters.shared_by(2)
    former, other = counters[0], counters[1]
    successor = former.at_seat(1)
    for one in (former, other, successor):
        one.take()
        one.add_client(1)
        one.add_octets(10)
        one.count_address("192.0.2.1", 1)
    for one in (former, other, successor):
        assert (one.clients, one.own_clients, one.octets, one.connections_of("192.0.2.1")) == (3, 1, 30, 3)
    former.clear()  # it was killed
    assert (other.clients, other.octets, other.connections_of("192.0.2.1")) == (2, 20, 2)
    assert successor.at_seat(0).own_clients == 0


def test_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address may be wrong some times, and again after a while; another's are its own; all processes count."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    counters = ProcessCounters.shared_by(2)
    guesses = counters[0].guesses
    for _ in range(20):
        assert not guesses.are_too_many("192.0.2.1")
        guesses.add("192.0.2.1")
    assert guesses.are_too_many("192.0.2.1")
    assert counters[1].guesses.are_too_many("192.0.2.1")
    assert not guesses.are_too_many("192.0.2.2")
    now[0] += 60
    assert not guesses.are_too_many("192.0.2.1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads; this child touches only the table
        child = os.fork()
    if not child:
        for _ in range(20):
            guesses.add("192.0.2.3")
        os._exit(0)
    os.waitpid(child, 0)
    assert guesses.are_too_many("192.0.2.3")


def test_passwords_of_clients_that_have_gone(product: Make, primary: ScriptedServer, tmp_path: Path) -> None:
    """Hundreds of guesses and resets: no work is left behind; who knew the password gets in."""
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('correct horse')}\n")
    house = product(
        primary=primary.address,
        backups=["127.0.0.1:9"],
        settings={"smtp.users_file": str(users), "smtp.auth_without_tls": "true"},
    )
    right = base64.b64encode(b"\0ann\0correct horse").decode()
    with house.dialogue() as client:
        client.hello()
        client.say(f"AUTH PLAIN {right}", 235)
    for n in range(600):
        client_socket = socket.create_connection(("127.0.0.1", house.smtp_port))
        client_socket.sendall(HELLO + b"AUTH PLAIN %s\r\n" % base64.b64encode(b"\0ann\0%d" % n))
        client_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client_socket.close()
    begun = time.monotonic()
    wait_until(lambda: house.metric("smtpdup_clients") == 0, 8)
    assert time.monotonic() - begun < 8
    with house.dialogue() as client:
        client.hello()
        client.say(f"AUTH PLAIN {right}", 235)
    with ExitStack() as ends:  # several at once, since each wrong guess is answered late
        clients = [ends.enter_context(house.dialogue()) for _ in range(8)]
        for client in clients:
            client.hello()
        wrong = base64.b64encode(b"\0ann\0no").decode()
        for _ in range(4):
            for client in clients:
                client.send(f"AUTH PLAIN {wrong}")
            if any(client.reply().startswith("421") for client in clients):
                return
    raise AssertionError("an address may guess for ever")


@both_loops
async def test_an_envelope_is_memory(chunking: ScriptedServer, redis_url: str) -> None:
    """Long recipients count as the octets of messages do: over the limit 452, and nothing stays counted."""
    settings = settings_of(chunking.address, {"smtp.max_bytes_in_flight": "1000000"})
    async with serve(settings, redis_url) as (made, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.say("MAIL FROM:<a@example.com>", 250)
        replies = [await client.say(f"RCPT TO:<{n}@{'x' * 3900}.example>") for n in range(300)]
        assert {reply[:3] for reply in replies} == {"250", "452"}
        assert 900_000 < made.counters.octets <= 1_004_200
        await client.say("RSET", 250)
        assert made.counters.octets == 0
        await client.mail("a@example.com", "b@example.com")
