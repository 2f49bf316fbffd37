"""However fast, slow or half a client goes away, at whatever stage: its place is free again, and a stop takes seconds.

The tests of test_stages wait until we have taken what a client said. Here it goes at once: its end is on its way to us
together with its words, and overtakes our replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loguru import logger

from support.certificates import Certificate
from support.dialogue import AsyncDialogue
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.product import Product
from support.reactions import Silence
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import until, wait_until

Make = Callable[..., Product]

HELLO = b"EHLO x\r\n"
MAIL = HELLO + b"MAIL FROM:<half@example.com>\r\n"
RCPT = MAIL + b"RCPT TO:<b@example.com>\r\n"
STAGES = {
    "connected": b"",
    "EHLO": HELLO,
    "STARTTLS": b"STARTTLS\r\n",
    "STARTTLS after EHLO": HELLO + b"STARTTLS\r\n",
    "a piece of a handshake": HELLO + b"STARTTLS\r\n\x16\x03\x01\x02\x00\x01",
    "AUTH": HELLO + b"AUTH PLAIN AGFubgB3cm9uZw==\r\n",
    "AUTH in steps": HELLO + b"AUTH LOGIN\r\nYW5u\r\n",
    "MAIL": MAIL,
    "RCPT": RCPT,
    "DATA": RCPT + b"DATA\r\n",
    "a body": RCPT + b"DATA\r\nSubject: half\r\n\r\n" + b"x" * 30_000,
    "BDAT": RCPT + b"BDAT 10\r\n12345",
    "XCLIENT": HELLO + b"XCLIENT ADDR=192.0.2.7\r\n",
    "QUIT": HELLO + b"QUIT\r\n",
    "many commands": HELLO + b"NOOP\r\n" * 300,
}
RESET = struct.pack("ii", 1, 0)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A line for each of so many clients would be most of the work."""
    logger.disable("relay")
    yield
    logger.enable("relay")


@pytest.fixture
def options(certificate: Certificate, tmp_path: Path) -> dict[str, str]:
    """Settings of a relay that offers all there is."""
    users = tmp_path / "users"
    users.write_text("")
    return {
        "smtp.users_file": str(users),
        "smtp.auth_without_tls": "true",
        "smtp.tls_certificate": str(certificate.certificate),
        "smtp.tls_key": str(certificate.key),
    }


@pytest.fixture
def chunking(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    return scripted(extensions=[*EXTENSIONS, "CHUNKING"])


def go(client: socket.socket, way: str) -> None:
    if way == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    elif way == "half-close":
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
    client.close()


def run_through(port: int, stages: list[bytes], pause: float, way: str, times: int) -> None:
    """Say something and go, with the pause between, at once after the connection and after the greeting."""
    for n in range(times):
        for said in stages:
            client = socket.create_connection(("127.0.0.1", port))
            with contextlib.suppress(OSError):
                if n % 2:
                    client.recv(100)
                client.sendall(said)
                if pause:
                    time.sleep(pause)  # of the client's: where in our work its end comes
            go(client, way)


@both_loops
@pytest.mark.parametrize("way", ["reset", "close", "half-close"])
async def test_gone_at_once(chunking: ScriptedServer, redis_url: str, options: dict[str, str], way: str) -> None:
    """Hundreds at a time that go behind, with and before our replies: all places are free again, of all kinds."""
    async with serve(settings_of(chunking.address, options), redis_url) as (made, port):
        stages = list(STAGES.values())
        pauses = (0, 0, 0.0002, 0.001)
        await asyncio.gather(*(asyncio.to_thread(run_through, port, stages, p, way, 6) for p in pauses))
        await until(lambda: not made.command_loops, 10, lambda: f"{len(made.command_loops)} are still there")
        assert (made.counters.clients, made.counters.octets, made.snapshot.primary.pool.in_use) == (0, 0, 0)
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.mail("whole@example.com", "b@example.com")
    assert [message.sender for message in chunking.messages] == ["whole@example.com"]


def handshakes(port: int, ending: str, times: int, *, implicit: bool) -> None:
    """Negotiate TLS, as far as ``ending`` says, and go."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for n in range(times):
        client = socket.create_connection(("127.0.0.1", port))
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with contextlib.suppress(OSError):  # ssl.SSLError is one
            if not implicit:
                client.recv(100)
                client.sendall(b"STARTTLS\r\n")
                client.recv(100)
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
            hello = outgoing.read()
            if ending == "in the hello":
                client.sendall(hello[: len(hello) // 2])
            elif ending == "after the hello":
                client.sendall(hello)
            else:
                client.sendall(hello)
                while True:
                    incoming.write(client.recv(65536))
                    try:
                        tls.do_handshake()
                        break
                    except ssl.SSLWantReadError:
                        client.sendall(outgoing.read())
                if ending == "close_notify":
                    with contextlib.suppress(ssl.SSLWantReadError):
                        tls.unwrap()
                elif ending == "a command":
                    tls.write(b"EHLO x\r\nQUIT\r\n")
                client.sendall(outgoing.read())
        go(client, "reset" if n % 3 else "close")


@both_loops
@pytest.mark.parametrize("implicit", [False, True], ids=["STARTTLS", "implicit"])
async def test_gone_in_tls(chunking: ScriptedServer, redis_url: str, options: dict[str, str], implicit: bool) -> None:
    """The same in the middle of a handshake, right behind it, and with the word that ends TLS."""
    async with serve(settings_of(chunking.address, options), redis_url, tls=implicit) as (made, port):
        endings = ("in the hello", "after the hello", "finished", "close_notify", "a command")
        await asyncio.gather(
            *(asyncio.to_thread(handshakes, port, ending, 40, implicit=implicit) for ending in endings)
        )
        await until(lambda: not made.command_loops, 10, lambda: f"{len(made.command_loops)} are still there")
        assert made.counters.clients == 0


@both_loops
async def test_tls_that_never_ends(
    chunking: ScriptedServer, redis_url: str, options: dict[str, str], certificate: Certificate
) -> None:
    """Who never answers our last word of TLS has its place for some seconds more, and no longer."""
    async with serve(settings_of(chunking.address, options), redis_url) as (made, port):
        loop = asyncio.get_running_loop()

        def quit_and_stay() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", port))
            plain.recv(100)
            plain.sendall(b"STARTTLS\r\n")
            plain.recv(100)
            client = certificate.client_context().wrap_socket(plain, server_hostname="localhost")
            client.sendall(b"QUIT\r\n")
            return client

        client = await asyncio.to_thread(quit_and_stay)
        begun = loop.time()
        await until(lambda: not made.command_loops, 15)
        assert loop.time() - begun < 10
        client.close()


def test_a_thousand_resets(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, options: dict[str, str]
) -> None:
    """STARTTLS and a reset, a thousand times before any login: the next client is greeted, a stop takes seconds."""
    house = product(
        primary=primary.address, backups=[backup.address], settings={**options, "smtp.max_connections": "100"}
    )
    run_through(house.smtp_port, [STAGES["STARTTLS"]], 0, "reset", 1000)
    wait_until(lambda: house.metric("smtpdup_clients") == 0, 10, "their places are not free")
    assert house.send("a@example.com", "b@example.com").startswith("250")
    begun = time.monotonic()
    assert house.stop() == 0
    assert time.monotonic() - begun < 15


@both_loops
async def test_gone_in_a_proxy_header(chunking: ScriptedServer, redis_url: str) -> None:
    """A load balancer that goes within its header, or behind it, leaves nothing."""
    header = b"PROXY TCP4 127.0.0.1 127.0.0.1 50000 25\r\n"
    async with serve(settings_of(chunking.address, {"smtp.proxy_protocol": "true"}), redis_url) as (made, port):
        stages = [b"", header[:20], header, header + RCPT, b"\r\n\r\n\x00\r\nQUIT\n\x21\x11", b"EHLO x\r\n"]
        ways = ("reset", "close", "half-close")
        await asyncio.gather(*(asyncio.to_thread(run_through, port, stages * 30, 0, way, 1) for way in ways))
        await until(lambda: not made.command_loops, 15, lambda: f"{len(made.command_loops)} are still there")
        assert (made.counters.clients, made.counters.octets, made.snapshot.primary.pool.in_use) == (0, 0, 0)


def test_a_stop_waits_for_nobody_who_does_nothing(
    product: Make, chunking: ScriptedServer, backup: ScriptedServer, options: dict[str, str]
) -> None:
    """One client has stopped in a handshake, one never reads our replies: a stop ends before their time-outs."""
    house = product(primary=chunking.address, backups=[backup.address], settings=options)
    stuck = socket.create_connection(("127.0.0.1", house.smtp_port))
    stuck.recv(100)
    stuck.sendall(STAGES["a piece of a handshake"])
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", house.smtp_port))
    deaf.settimeout(1)
    with contextlib.suppress(TimeoutError):
        deaf.sendall(RCPT + b"BDAT 1\r\nx" * 500_000)  # until it is not read from any more
    with stuck, deaf:
        assert house.stop(60) == 0


def test_a_stop_waits_for_no_half_message(
    product: Make, chunking: ScriptedServer, backup: ScriptedServer, options: dict[str, str]
) -> None:
    """Clients that stall at each stage: none of them holds up a stop for long."""
    house = product(primary=chunking.address, backups=[backup.address], settings=options)
    with contextlib.ExitStack() as ends:
        for said in STAGES.values():
            client = ends.enter_context(socket.create_connection(("127.0.0.1", house.smtp_port)))
            client.sendall(said)
        ended = {"QUIT", "many commands"}  # by their own words, or for them
        wait_until(lambda: house.metric("smtpdup_clients") >= len(STAGES) - len(ended))
        begun = time.monotonic()
        assert house.stop(90) == 0
        assert time.monotonic() - begun < 25  # of the 30 s for who still sends
    assert not chunking.messages


@pytest.mark.long
def test_a_stop_waits_for_nobody_who_sends_without_end(
    product: Make, chunking: ScriptedServer, backup: ScriptedServer, options: dict[str, str]
) -> None:
    """A message that comes octet by octet has half a minute to be whole."""
    house = product(primary=chunking.address, backups=[backup.address], settings=options)
    with house.dialogue() as slow:
        slow.hello()
        slow.say("MAIL FROM:<slow@example.com>", 250)
        slow.say("RCPT TO:<b@example.com>", 250)
        slow.say("DATA", 354)
        over = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.2):
                    slow.raw(b"x" * 200)

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            begun = time.monotonic()
            assert house.stop(90) == 0
            assert time.monotonic() - begun < 60
        finally:
            over.set()
            thread.join()
    assert not chunking.messages


@pytest.mark.long
def test_a_stop_waits_for_no_primary_that_is_silent_before_the_dot(
    product: Make, scripted: Callable[..., ScriptedServer], backup: ScriptedServer
) -> None:
    """A primary that answers no RCPT has the message of nobody: after a while a stop goes on without it."""
    silent = scripted({"RCPT": Silence()})
    house = product(primary=silent.address, backups=[backup.address])
    with house.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.send("RCPT TO:<b@example.com>")
        wait_until(lambda: any(command.startswith("RCPT") for command in silent.commands))
        begun = time.monotonic()
        assert house.stop(90) == 0
        assert time.monotonic() - begun < 60  # of the two minutes that RCPT may take
        silent.drop()


WORDS = [
    HELLO, b"MAIL FROM:<half@example.com>\r\n", b"RCPT TO:<b@example.com>\r\n", b"DATA\r\n",
    b"Subject: x\r\n\r\ntext\r\n", b"BDAT 5\r\n12345", b"BDAT 100000\r\n12",
    b"STARTTLS\r\n", b"\x16\x03\x01\x02\x00\x01", b"RSET\r\n", b"QUIT\r\n",
    b"AUTH PLAIN AGFubgB3cm9uZw==\r\n", b"AUTH LOGIN\r\n", b"YW5u\r\n", b"XCLIENT ADDR=192.0.2.7\r\n", b"NOOP\r\n",
    b"XFORWARD NAME=x\r\n", b"\0", b"\r\n", b"x" * 5000,
]  # fmt: skip


ROUNDS_GROW = 8_000_000  # octets; a session that stays takes some 20,000


def _in_tls(client: socket.socket) -> socket.socket:
    """Negotiate TLS, which may break off at any time-out; what follows is said under it."""
    client.settimeout(1)
    client.sendall(b"STARTTLS\r\n")
    while not (said := client.recv(1000)).endswith(b"start TLS\r\n"):
        if not said:
            raise ConnectionError("refused")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(client)


def break_off(port: int, times: int, seed: int) -> None:
    """Say something, read or not, and go, at any octet of it and in any way."""
    chance = random.Random(seed)
    for _ in range(times):
        said = b"".join(chance.choices(WORDS, k=chance.randrange(9)))
        said = said[: chance.randrange(len(said) + 1)] if chance.random() < 0.3 else said
        client = socket.create_connection(("127.0.0.1", port))
        with contextlib.suppress(OSError):
            client.settimeout(0.02)
            if chance.random() < 0.5:
                client.recv(1000)
            if chance.random() < 0.05:
                client = _in_tls(client)
            client.sendall(said)
            if chance.random() < 0.3:
                client.recv(chance.choice([1, 1000]))
            elif chance.random() < 0.3:
                time.sleep(chance.random() / 500)
        go(client, chance.choice(["reset", "reset", "close", "half-close"]))


@pytest.mark.parametrize(
    "count",
    [
        int(os.environ.get("BROKEN_SESSIONS", "1500")),
        pytest.param(29_000, marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
def test_thousands_of_broken_sessions(
    product: Make, chunking: ScriptedServer, backup: ScriptedServer, options: dict[str, str], count: int
) -> None:
    """Whatever they say and wherever they go: no place, memory or connection is left, and a stop takes seconds."""
    house = product(primary=chunking.address, backups=[backup.address], settings={**options, "log.level": "debug"})
    relay = house.child("relay-1")
    times = count // 6
    size, grown = 0, ROUNDS_GROW + 1
    for _ in range(6):  # the first make what is made once; what leaks grows with each
        seed = random.randrange(1 << 30)
        threads = [threading.Thread(target=break_off, args=(house.smtp_port, times // 2, seed + n)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: house.metric("smtpdup_clients") == 0, 20, f"places are not free, seed {seed}")
        size, grown = (now := _resident(relay.pid)), now - size
        if grown <= ROUNDS_GROW:
            break
    assert grown <= ROUNDS_GROW
    assert "session error" not in house.log
    assert house.send("a@example.com", "b@example.com").startswith("250")
    begun = time.monotonic()
    assert house.stop() == 0
    assert time.monotonic() - begun < 15


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
