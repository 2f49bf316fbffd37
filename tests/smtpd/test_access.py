"""Who comes in, and how: TLS, users, load balancers, limits. What the dialogues cannot say, on both event loops."""

from __future__ import annotations

import asyncio
import base64
import signal
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from relay.mail.reply import Reply, wire
from relay.smtpd.context import Context
from relay.smtpd.passwords import hash_password
from support.certificates import Certificate
from support.dialogue import AsyncDialogue, Dialogue, Unexpected
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import free_port, until, wait_until

Make = Callable[..., Product]
Open = Callable[..., AbstractAsyncContextManager[tuple[Context, int]]]
ANN = base64.b64encode(b"\0ann\0secret").decode()


@pytest.fixture
def relay(primary: ScriptedServer, redis_url: str, certificate: Certificate) -> Open:
    """Call it for a front with these settings, with a certificate."""

    def make(
        settings: Mapping[str, str] | None = None, **options: bool
    ) -> AbstractAsyncContextManager[tuple[Context, int]]:
        with_tls = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
        return serve(settings_of(primary.address, {**with_tls, **(settings or {})}), redis_url, **options)

    return make


async def secured(client: AsyncDialogue, certificate: Certificate) -> None:
    await client.writer.start_tls(certificate.client_context(), server_hostname="localhost")


# TLS


@both_loops
async def test_starttls(relay: Open, primary: ScriptedServer, certificate: Certificate) -> None:
    """Mail under TLS, large mail too, on the same connection as the greeting; the trace line says so."""
    async with relay() as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.say("STARTTLS", 220)
        await secured(client, certificate)
        assert "STARTTLS" not in await client.hello()
        await client.mail("a@example.com", "b@example.com", data=b"Subject: x\r\n\r\n" + b"0123456789\r\n" * 100_000)
        await client.quit()
    (message,) = primary.messages
    assert b" with ESMTPS id " in message.trace
    assert len(message.content) == 14 + 1_200_000


@both_loops
async def test_implicit_tls(relay: Open, primary: ScriptedServer, certificate: Certificate) -> None:
    """TLS from the first octet."""
    async with relay(tls=True) as (_, port):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=certificate.client_context(), server_hostname="localhost"
        )
        client = AsyncDialogue(reader, writer, 20)
        await client.expect(220)
        await client.hello()
        await client.mail("a@example.com", "b@example.com")
        await client.quit()
    assert len(primary.messages) == 1


@both_loops
async def test_proxy_header_before_implicit_tls(relay: Open, certificate: Certificate) -> None:
    """A load balancer's header and the beginning of the handshake come in one packet: neither is lost."""
    settings = {"smtp.proxy_protocol": "true", "smtp.allowed_networks": "192.0.2.0/24"}
    async with relay(settings, tls=True) as (made, port):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = certificate.client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PROXY TCP4 192.0.2.7 127.0.0.1 50000 465\r\n" + outgoing.read())
        greeting = b""
        while not greeting:
            incoming.write(await asyncio.wait_for(reader.read(65536), 20))
            try:
                tls.do_handshake()
                writer.write(outgoing.read())
                greeting = tls.read(1000)
            except ssl.SSLWantReadError:
                writer.write(outgoing.read())
        assert greeting.startswith(b"220 ")
        assert [client._peer.address for client in made.command_loops] == ["192.0.2.7"]
        writer.close()


@both_loops
async def test_a_handshake_that_fails(relay: Open, primary: ScriptedServer) -> None:
    """Garbage instead of a handshake, or a hang-up in it, ends that connection and nothing else."""
    async with relay() as (made, port):
        for rubbish in (b"EHLO x\r\n" * 100, b""):
            client = await AsyncDialogue.open(port)
            await client.say("STARTTLS", 220)
            if rubbish:
                await client.raw(rubbish)
            await client.close()
        await until(lambda: not made.command_loops)
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.mail("a@example.com", "b@example.com")
    assert len(primary.messages) == 1


def test_old_tls_is_refused(product: Make, primary: ScriptedServer, redis_url: str, certificate: Certificate) -> None:
    """TLS 1.2 is the oldest."""
    settings = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
    made = product(command="relay", primary=primary.address, redis_url=redis_url, settings=settings)
    context = certificate.client_context()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with made.dialogue() as client, pytest.raises(ssl.SSLError):
        client.starttls(context)


def test_certificate_and_users_are_read_again_on_sighup(
    product: Make, primary: ScriptedServer, redis_url: str, tmp_path: Path
) -> None:
    """SIGHUP to the supervisor: a new certificate and new users count from the next connection on; bad ones do not."""
    old, new = Certificate(tmp_path, "old"), Certificate(tmp_path, "new")
    where = tmp_path / "live.pem"
    users = tmp_path / "users"

    def install(source: Certificate) -> None:
        where.write_text(source.key.read_text() + source.certificate.read_text())

    def greets_with(source: Certificate) -> bool:
        context = source.client_context()
        context.check_hostname = False
        with made.dialogue() as client:
            try:
                client.starttls(context)
            except ssl.SSLCertVerificationError:
                return False
            client.hello()
            return True

    install(old)
    users.write_text("")
    settings = {"smtp.tls_certificate": str(where), "smtp.users_file": str(users), "smtp.auth_without_tls": "true"}
    made = product(command="relay", primary=primary.address, redis_url=redis_url, settings=settings)
    assert greets_with(old)
    assert not greets_with(new)
    install(new)
    users.write_text(f"ann:{hash_password('secret')}\n")
    assert made.process is not None
    made.process.send_signal(signal.SIGHUP)
    made.wait_for_log("reloaded")
    assert greets_with(new)
    with made.dialogue() as client:
        client.hello()
        client.say(f"AUTH PLAIN {ANN}", 235)
    where.write_text("rubbish")
    made.process.send_signal(signal.SIGHUP)
    made.wait_for_log("not reloaded")
    assert greets_with(new)
    assert made.stop() == 0


# Trace and identity


@both_loops
async def test_who_is_named(relay: Open, primary: ScriptedServer, tmp_path: Path) -> None:
    """The trace line names the client that the load balancer named, and says that it has logged in."""
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('secret')}\n")
    settings = {
        "smtp.proxy_protocol": "true",
        "smtp.users_file": str(users),
        "smtp.auth_without_tls": "true",
        "smtp.allowed_networks": "192.0.2.0/24",
    }
    primary.extensions.append("XFORWARD NAME ADDR PORT PROTO HELO SOURCE")
    async with relay(settings) as (_, port), await AsyncDialogue.open(port, greeting=None) as client:
        await client.raw(b"PROXY TCP4 198.51.100.7 127.0.0.1 50000 25\r\n")
        await client.expect(220)
        await client.hello("h.example")
        await client.say("MAIL FROM:<a@example.com>", "530 5.7.0")
        await client.say(f"AUTH PLAIN {ANN}", 235)
        await client.mail("a@example.com", "b@example.com")
    (message,) = primary.messages
    assert b"from h.example ([198.51.100.7])\r\n" in message.trace
    assert b" with ESMTPA id " in message.trace
    told = {"ADDR": "198.51.100.7", "PORT": "50000", "PROTO": "ESMTP", "HELO": "h.example", "SOURCE": "REMOTE"}
    assert message.xforward == told


def test_a_backup_is_told_whose_mail_it_is(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """The copy comes with the identity that the message came with, pipelined with MAIL."""
    backup.extensions.append("XFORWARD NAME ADDR HELO")
    made = product(primary=primary.address, backups=[backup.address])
    with made.dialogue() as client:
        client.hello()
        client.say("XFORWARD ADDR=192.0.2.7 HELO=h.example IDENT=4X", 250)
        client.mail("a@example.com", "b@example.com")
        client.mail("c@example.com", "b@example.com")
    first, second = sorted(backup.wait_for(2), key=lambda copy: copy.sender)
    assert first.xforward == {"ADDR": "192.0.2.7", "HELO": "h.example"}
    assert second.xforward == {}  # it came from this machine, which is nobody to tell of


def test_a_backup_that_grants_it_hears_xclient(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """And where the backup grants XCLIENT it is introduced so."""
    backup.extensions.append("XCLIENT ADDR HELO")
    made = product(primary=primary.address, backups=[backup.address])
    with made.dialogue() as client:
        client.hello()
        client.say("XFORWARD ADDR=192.0.2.7", 250)
        client.mail("a@example.com", "b@example.com")
    backup.wait_for(1)
    verbs = [c.split(" ")[0] for c in backup.commands]
    assert "XCLIENT ADDR=192.0.2.7" in backup.commands
    assert verbs.index("MAIL") > verbs.index("XCLIENT")
    assert verbs.count("EHLO") == 2


@both_loops
async def test_requiretls_is_carried(
    scripted: Callable[..., ScriptedServer], redis_url: str, certificate: Certificate
) -> None:
    """Where both sides are under TLS and the primary's certificate is verified, REQUIRETLS goes on (RFC 8689)."""
    primary = scripted(tls=certificate.server_context(), extensions=[*EXTENSIONS, "REQUIRETLS"])
    address = f"smtp://localhost:{primary.port}?tls=verify&ca_file={certificate.certificate}"
    settings = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
    async with (
        serve(settings_of(address, settings), redis_url) as (_, port),
        await AsyncDialogue.open(port) as client,
    ):
        assert "REQUIRETLS" not in await client.hello()
        await client.say("MAIL FROM:<a@example.com> REQUIRETLS", "550 5.7.30")
        await client.say("STARTTLS", 220)
        await secured(client, certificate)
        assert "REQUIRETLS" in await client.hello()
        await client.say("MAIL FROM:<a@example.com> REQUIRETLS", 250)
    assert "MAIL FROM:<a@example.com> REQUIRETLS" in primary.commands


def test_requiretls_to_a_backup_without(
    product: Make, scripted: Callable[..., ScriptedServer], backup: ScriptedServer, certificate: Certificate
) -> None:
    """A copy that must travel under TLS goes to no backup that cannot promise it: it is in the failed list."""
    primary = scripted(tls=certificate.server_context(), extensions=[*EXTENSIONS, "REQUIRETLS"])
    settings = {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
    address = f"smtp://localhost:{primary.port}?tls=verify&ca_file={certificate.certificate}"
    made = product(primary=address, backups=[backup.address], settings=settings)
    with made.dialogue() as client:
        client.starttls(certificate.client_context())
        client.hello()
        client.say("MAIL FROM:<a@example.com> REQUIRETLS", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.body(b"Subject: x\r\n\r\n")
    (failure,) = wait_until(lambda: made.json("failed", "list"))
    assert "5.7.30" in failure["reply"]
    assert "DATA" not in backup.commands
    made.stop()
    primary.wait_until(lambda: not primary.open_connections)  # under TLS a hang-up takes two


# Limits


@both_loops
async def test_a_wrong_password_costs_a_second(relay: Open, tmp_path: Path) -> None:
    """Who guesses passwords waits a second for each answer, on one connection at most five times."""
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('other')}\n")
    settings = {"smtp.users_file": str(users), "smtp.auth_without_tls": "true"}
    async with relay(settings) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        begun = time.monotonic()
        await client.say(f"AUTH PLAIN {ANN}", 535)
        assert time.monotonic() - begun >= 1


def test_who_has_gone_before_we_look_is_let_in_nowhere(product: Make, primary: ScriptedServer) -> None:
    """A connection that was reset before it is taken has no address any more, though what it sent can still be read:
    nobody's network is not an allowed one.
    """
    strangers = {"smtp.allowed_networks": "192.0.2.1/32", "smtp.xforward_networks": ""}
    one = product(primary=primary.address, settings=strangers)
    relay = one.child("relay-1")
    relay.signal(signal.SIGSTOP)
    client = socket.create_connection(("127.0.0.1", one.smtp_port))
    client.sendall(b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n\r\nx\r\n.\r\n")
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    relay.signal(signal.SIGCONT)
    wait_until(lambda: "Client address not allowed" in one.log or primary.messages)
    assert not primary.messages


@both_loops
async def test_connections_of_one_client(relay: Open) -> None:
    """No more than smtp.max_connections_per_client from one address; one that leaves makes room."""
    settings = {
        "smtp.max_connections_per_client": "2",
        "smtp.proxy_protocol": "true",
        "smtp.allowed_networks": "192.0.2.0/24",
    }

    async def connected(address: str) -> AsyncDialogue:
        client = await AsyncDialogue.open(port, greeting=None)
        await client.raw(f"PROXY TCP4 {address} 127.0.0.1 50000 25\r\n".encode())
        return client

    async with relay(settings) as (made, port):
        clients = [await connected("192.0.2.1") for _ in range(2)]
        for client in clients:
            await client.expect(220)
        async with await connected("192.0.2.1") as third:
            await third.expect("421 4.7.0")
        async with await connected("192.0.2.2") as other:
            await other.expect(220)
        await clients[0].quit()
        await until(lambda: len(made.command_loops) == 1)
        async with await connected("192.0.2.1") as again:
            await again.expect(220)
        await clients[1].close()


def test_a_slow_body_comes_to_an_end(product: Make, primary: ScriptedServer, redis_url: str) -> None:
    """An octet now and then is not enough: smtp.min_data_rate holds over the whole message."""
    settings = {"smtp.idle_timeout": "2", "smtp.min_data_rate": "1000"}
    made = product(command="relay", primary=primary.address, redis_url=redis_url, settings=settings)
    begun = time.monotonic()
    with made.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("DATA", 354)
        client.sock.settimeout(0.2)
        client.timeout = 0.2
        reply = ""
        while not reply and time.monotonic() < begun + 20:
            client.raw(b"x")
            try:
                reply = client.line()
            except Unexpected:
                continue
        assert reply.startswith("421 4.4.2")
    assert time.monotonic() - begun < 15


# What must not start


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"smtp.listen": "0.0.0.0:0", "smtp.allowed_networks": "0.0.0.0/0"}, "open relay"),
        ({"smtp.listen": "[::]:0", "smtp.allowed_networks": "127.0.0.1,::/0"}, "open relay"),
        ({"smtp.listen": ":0", "smtp.allowed_networks": "0.0.0.0/1,128.0.0.0/1"}, "open relay"),
        ({"smtp.listen": "mx.example.com:25", "smtp.allowed_networks": "0.0.0.0/0"}, "open relay"),
        ({"smtp.proxy_protocol": "true", "smtp.allowed_networks": "0.0.0.0/0"}, "open relay"),
        ({"smtp.tls": "encrypt"}, "smtp.tls: needs smtp.tls_certificate"),
        ({"smtp.listen_tls": ":465"}, "smtp.listen_tls: needs smtp.tls_certificate"),
        ({"smtp.tls_key": "/x"}, "smtp.tls_key: has a meaning only with"),
        ({"smtp.tls_certificate": "/nowhere.pem"}, "smtp.tls_certificate: /nowhere.pem cannot be read"),
        ({"smtp.users_file": "/nowhere"}, "smtp.users_file: /nowhere cannot be read"),
        ({"smtp.tls_certificate": __file__}, "smtp.tls_certificate: "),
        ({"smtp.users_file": "users"}, "expected a hash made by"),
    ],
)
def test_what_does_not_start(product: Make, redis_url: str, settings: dict[str, str], wanted: str) -> None:
    """An open relay and what has no effect or no file: one line that says which setting, and what to do."""
    made = product(
        command="relay",
        primary="192.0.2.1:25",
        redis_url=redis_url,
        settings={"status.listen": "off", **settings},
        files={"users": "ann:no hash at all\n"},
        start=False,
    )
    (made.directory / "users").chmod(0o600)
    made.start(wait=False)
    assert made.wait() in (1, 2)
    assert wanted in made.log
    assert "Traceback" not in made.log


@pytest.mark.parametrize(
    "settings",
    [
        {},  # what GoSMTP-dup's container has, and its clients are on this machine
        {"smtp.allowed_networks": "10.0.0.0/8,fc00::/7"},
        {"smtp.allowed_networks": "0.0.0.0/0", "smtp.allowed_domains": "example.com"},
    ],
)
def test_what_does_start(product: Make, primary: ScriptedServer, redis_url: str, settings: dict[str, str]) -> None:
    """Listening to the world with a rule of who or where to; without one it is said who is let in."""
    port = free_port()
    made = product(
        command="relay",
        primary=primary.address,
        redis_url=redis_url,
        settings={"smtp.listen": f"0.0.0.0:{port}", "status.listen": "off", **settings},
        start=False,
    )
    made.smtp_port = port
    made.start(wait=False)
    made.wait_for_log("relay started")
    assert ("only clients on this machine are let in: set smtp.allowed_networks" in made.log) == (not settings)


def test_check_tells_of_certificate_and_users(
    product: Make, redis_url: str, primary: ScriptedServer, tmp_path: Path
) -> None:
    """`smtp-dup check` says whether they can be used."""
    users = tmp_path / "users"
    users.write_text(f"ann:{hash_password('secret')}\n")
    options = {"command": "relay", "primary": primary.address, "redis_url": redis_url, "start": False}
    good = product(**options, settings={"smtp.users_file": str(users)})
    assert "1 user may log in" in good.run("check").stdout
    bad = product(**options, settings={"smtp.users_file": str(tmp_path)})
    done = bad.run("check")
    assert done.returncode == 1
    assert "TROUBLE" in done.stdout


def test_hash_password(product: Make) -> None:
    """`smtp-dup hash-password` turns what it reads into a line's second half."""
    made = product(start=False)
    done = made.run("hash-password", input="secret\n")
    assert done.returncode == 0
    assert done.stdout.startswith("$scrypt$")
    assert made.run("hash-password", input="\n").returncode == 1


def test_readiness_behind_a_load_balancer(product: Make, primary: ScriptedServer, redis_url: str) -> None:
    """/readyz knows how to knock."""
    settings = {"smtp.proxy_protocol": "true"}
    made = product(command="relay", primary=primary.address, redis_url=redis_url, settings=settings, start=False)
    made.start(wait=False)
    wait_until(lambda: _ready(made), message=lambda: made.log)


def _ready(made: Product) -> bool:
    try:
        return made.get("/readyz")[0] == 200
    except OSError:
        return False


def test_reply_is_safe() -> None:
    """No octet of a reply can begin a line of its own."""
    assert wire(Reply(250, ("a\r\nb\0\x85\u2028c",))) == rb"250 a\r\nb\x00\x85\u2028c" + b"\r\n"


@both_loops
async def test_a_client_that_does_not_listen(relay: Open, primary: ScriptedServer) -> None:
    """Who talks and never reads the replies is not waited for longer than for one that is silent."""
    primary.replies["RCPT"] = "250 2.1.5 " + "x" * 480
    async with relay({"smtp.lease_idle_timeout": "1", "smtp.max_recipients": "1000000"}) as (made, port):
        loop = asyncio.get_running_loop()
        with socket.socket() as deaf:
            deaf.setblocking(False)
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(deaf, ("127.0.0.1", port))
            await loop.sock_sendall(deaf, b"EHLO x\r\nMAIL FROM:<a@example.com>\r\n")
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(_talk_on(deaf), 60)
        await until(lambda: not made.command_loops)


async def _talk_on(client: socket.socket) -> None:
    while True:
        await asyncio.get_running_loop().sock_sendall(client, b"RCPT TO:<b@example.com>\r\n" * 100)


def _talk_for_ever(client: socket.socket) -> None:
    for _ in range(1000):
        client.sendall(b"FOO\r\n" * 10_000)


def test_many_lines_at_once(product: Make, primary: ScriptedServer, redis_url: str) -> None:
    """A client that goes on talking and never reads is dropped, and costs no memory: it is its own backlog."""
    made = product(command="relay", primary=primary.address, redis_url=redis_url)
    with socket.create_connection(("127.0.0.1", made.smtp_port)) as client:
        client.settimeout(20)
        with pytest.raises(ConnectionError):
            _talk_for_ever(client)
    with Dialogue(made.smtp_port) as other:
        other.hello()
