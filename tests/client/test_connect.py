"""The handshake: every mode of TLS, AUTH, old and odd servers; and each failure names its stage."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ConnectFailed, ConnectionGone
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts
from support.certificates import Certificate
from support.event_loops import at_end, both_loops
from support.reactions import Close, Gate, Reset, Silence
from support.scripted_server import ScriptedServer
from support.waiting import free_port, until

Scripted = Callable[..., ScriptedServer]
LONG = 20.0


async def opened(server: ScriptedServer, timeout: float = LONG, **options: Any) -> Connection:
    connection = await connect(
        server.destination(**options), local_hostname="relay.example", timeouts=Timeouts.of(timeout)
    )
    at_end.append(connection.close)
    return connection


async def refused(server: ScriptedServer, timeout: float = LONG, **options: Any) -> ConnectFailed:
    with pytest.raises(ConnectFailed) as caught:
        await opened(server, timeout, **options)
    await server.until(lambda: not server.open_connections)  # nothing is left open behind
    return caught.value


async def deliver(connection: Connection, body: bytes = b"Subject: x\r\n\r\nx\r\n") -> None:
    connection.send(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"DATA")
    assert [(await connection.reply(timeout=LONG)).code for _ in range(3)] == [250, 250, 354]
    connection.begin_data()
    await connection.write_body(body, timeout=LONG)
    connection.end_body()
    assert (await connection.reply(timeout=LONG)).code == 250
    connection.end_data()
    assert connection.is_usable


@both_loops
async def test_plain(scripted: Scripted):
    """A session without TLS: extensions by capital keyword with parameters, keepalive and no delay on the socket."""
    server = scripted(extensions=["pipelining", "Size 1000", "AUTH=LOGIN PLAIN"])
    connection = await opened(server)
    gc.collect()  # what made the connection goes, and must not take it along
    assert connection.extensions == {"PIPELINING": "", "SIZE": "1000", "AUTH": "LOGIN PLAIN"}
    assert not connection.is_encrypted
    assert server.connections[0].helo == "relay.example"
    options = connection._transport.get_extra_info("socket")
    assert options.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert options.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    await deliver(connection)
    server.drop()
    await until(lambda: not connection.is_open)


@both_loops
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("tls", ["opportunistic", "encrypt", "verify"])
async def test_tls(scripted: Scripted, certificate: Certificate, tls: str, implicit: bool):
    """STARTTLS and smtps carry transactions, also large ones, and the end of the connection is noticed."""
    server = scripted(tls=certificate.server_context(), implicit_tls=implicit)
    ca_file = str(certificate.certificate) if tls == "verify" else ""
    connection = await opened(server, tls=tls, host="localhost", ca_file=ca_file)
    gc.collect()
    assert connection.is_encrypted
    assert "STARTTLS" not in connection.extensions
    await deliver(connection)
    await deliver(connection, b"x" * 998 + b"\r\n" * 4096)
    assert [len(m.wire) for m in server.messages] == [17, 9190]
    big = (b"x" * 998 + b"\r\n") * 8192
    await deliver(connection, big)
    assert server.messages[-1].wire == big
    await connection.quit()
    await server.until(lambda: server.connections[0].closed == "quit")
    connection = await opened(server, tls=tls, host="localhost", ca_file=ca_file)
    server.drop()
    await until(lambda: not connection.is_usable)


@both_loops
@pytest.mark.parametrize("encrypted", [False, True])
async def test_closed_by_ourselves_while_a_reply_is_owed(scripted: Scripted, certificate: Certificate, encrypted: bool):
    """A close, as at the end of the process, ends every wait at once, also inside TLS with a server that is silent."""
    gate = Gate()
    server = scripted({"NOOP": (gate, Silence())}, tls=certificate.server_context() if encrypted else None)
    connection = await opened(server)
    waiting = asyncio.ensure_future(connection.command(b"NOOP", timeout=LONG))
    await gate.arrival()
    connection.close()
    connection.close()
    with pytest.raises(ConnectionGone):
        await waiting
    assert connection.is_encrypted == encrypted


@both_loops
async def test_tls_none_ignores_the_offer(scripted: Scripted, certificate: Certificate):
    """With tls = "none" STARTTLS is never said."""
    server = scripted(tls=certificate.server_context())
    assert not (await opened(server, tls="none")).is_encrypted
    assert server.connections[0].verbs == ["EHLO"]


@both_loops
@pytest.mark.parametrize("implicit", [False, True])
async def test_verify_refuses_the_wrong_certificate(
    scripted: Scripted, certificate: Certificate, tmp_path: Path, implicit: bool
):
    """With tls = "verify" neither an unknown issuer nor another host's name will do, and nothing is sent in plain."""
    other = Certificate(tmp_path, "other.example")
    server = scripted(tls=other.server_context(), implicit_tls=implicit)
    unknown = {"ca_file": str(certificate.certificate), "host": "localhost"}
    wrong_name = {"ca_file": str(other.certificate), "host": "localhost"}
    for options in (unknown, wrong_name, {}):
        error = await refused(server, tls="verify", **options)
        assert error.stage == "TLS"
        assert "certificate not accepted" in str(error)
    assert not any(c.tls and c.commands for c in server.connections if not implicit)
    error = await refused(server, tls="verify", ca_file="/nonexistent")
    assert (error.stage, error.reason) == ("TLS", "No such file or directory")


@both_loops
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("tls", ["opportunistic", "encrypt", "verify"])
async def test_our_certificate(scripted: Scripted, certificate: Certificate, tmp_path: Path, tls: str, implicit: bool):
    """A server that asks for a certificate gets ours, and is asked by the name under which it is known (SNI)."""
    ours = Certificate(tmp_path, "relay.example")
    context, names = certificate.server_context(), list[str | None]()
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ours.certificate)
    context.sni_callback = lambda _, name, __: names.append(name)
    server = scripted(tls=context, implicit_tls=implicit)
    known = {"tls": tls, "host": "localhost", "ca_file": str(certificate.certificate) if tls == "verify" else ""}
    mine = {"tls_certificate": str(ours.certificate), "tls_key": str(ours.key)}
    first = await opened(server, **known, **mine)
    await deliver(first)
    await first.quit()
    assert names == ["localhost"]
    both = tmp_path / "both.pem"
    both.write_bytes(ours.certificate.read_bytes() + ours.key.read_bytes())
    second = await opened(server, **known, tls_certificate=str(both))
    await deliver(second)
    await second.quit()
    assert len(server.messages) == 2
    if tls == "opportunistic":  # which goes on in plain text
        return
    other = Certificate(tmp_path, "other.example")
    await refused(server, **known, tls_certificate=str(other.certificate), tls_key=str(other.key))
    await refused(server, **known, tls_certificate=str(ours.certificate), tls_key=str(other.key))
    await refused(server, **known)


@both_loops
@pytest.mark.parametrize("spoiled", [Close(), Reset(), b"this is no TLS\r\n"])
async def test_opportunistic_goes_on_in_plain(scripted: Scripted, certificate: Certificate, spoiled: object):
    """When the TLS handshake fails a second connection is made without; encrypt fails instead, and so do passwords."""
    server = scripted({"TLS": (spoiled, Close())}, tls=certificate.server_context())
    connection = await opened(server)
    assert not connection.is_encrypted
    assert [c.verbs for c in server.connections] == [["EHLO", "STARTTLS"], ["EHLO"]]
    await deliver(connection)
    connection.close()
    assert (await refused(server, tls="encrypt")).stage == "TLS"
    assert (await refused(server, username="u", password="secret")).stage == "TLS"


@both_loops
async def test_starttls_refused_or_missing(scripted: Scripted, certificate: Certificate):
    """A 454 to STARTTLS leaves an opportunistic session in plain, on the same connection; encrypt fails."""
    server = scripted({"STARTTLS": "454 4.7.0 not now"}, tls=certificate.server_context())
    connection = await opened(server)
    assert not connection.is_encrypted
    await deliver(connection)
    connection.close()
    error = await refused(server, tls="encrypt")
    assert (error.stage, error.reply) == ("STARTTLS", Reply(454, ("4.7.0 not now",)))
    error = await refused(scripted(), tls="encrypt")
    assert (error.stage, error.reason) == ("STARTTLS", "the server does not offer STARTTLS")


@both_loops
async def test_what_is_injected_before_tls_does_not_count(scripted: Scripted, certificate: Certificate):
    """Replies put behind STARTTLS's 220 in plain text are dropped, or spoil the handshake; they answer nothing."""
    server = scripted({"STARTTLS": b"220 go\r\n250 injected\r\n"}, tls=certificate.server_context())
    outcome = (await asyncio.gather(opened(server, tls="encrypt"), return_exceptions=True))[0]
    if isinstance(outcome, Connection):
        assert "PIPELINING" in outcome.extensions
        assert outcome.is_usable
    else:
        assert isinstance(outcome, ConnectFailed)
        assert outcome.stage == "TLS"


@both_loops
async def test_passwords(scripted: Scripted, certificate: Certificate):
    """AUTH happens inside TLS; without TLS only where tls = "none" says so; and the password is in no error."""
    user = {"username": "user", "password": "pass word"}
    server = scripted(tls=certificate.server_context(), extensions=["AUTH PLAIN LOGIN"])
    await opened(server, **user)
    assert server.connections[0].login == ("user", "pass word")
    assert server.connections[0].tls

    plain = scripted(extensions=["AUTH LOGIN"])
    error = await refused(plain, **user)
    assert (error.stage, error.reason) == ("AUTH", "no password is sent without TLS")
    assert plain.connections[0].login is None
    (await opened(plain, tls="none", **user)).close()
    assert plain.connections[1].login == ("user", "pass word")

    plain.replies["AUTH"] = "535 5.7.8 no\nreally not"
    error = await refused(plain, tls="none", **user)
    assert (error.stage, error.reply) == ("AUTH", Reply(535, ("5.7.8 no", "really not")))
    assert "pass word" not in repr(error) + str(error)
    assert (await refused(scripted(), tls="none", **user)).stage == "AUTH"


@both_loops
async def test_methods_of_auth(scripted: Scripted):
    """CRAM-MD5 is tried first, as in the example of RFC 2195; a method that is refused is followed by the next one."""
    user = {"username": "tim", "password": "tanstaaftanstaaf", "tls": "none"}
    server = scripted(extensions=["AUTH LOGIN plain CRAM-MD5"])
    await opened(server, **user)
    assert server.connections[0].login == ("tim", "b913a602c7eda7a495b4e6e7334d3890")
    server.replies["AUTH CRAM-MD5"] = "535 5.7.8 no such secret"
    server.replies["AUTH PLAIN"] = "504 5.5.4 not really"
    await opened(server, **user)
    assert server.connections[1].login == ("tim", "tanstaaftanstaaf")
    assert [line.split(" ")[1] for line in server.connections[1].commands if line.startswith("AUTH")] == [
        "CRAM-MD5",
        "PLAIN",
        "LOGIN",
    ]
    none = scripted(extensions=["AUTH GSSAPI"])
    assert (await refused(none, **user)).stage == "AUTH"


@both_loops
async def test_lmtp(scripted: Scripted):
    """LMTP is greeted with LHLO, and its extensions are read."""
    server = scripted(lmtp=True)
    connection = await opened(server)
    assert server.connections[0].verbs == ["LHLO"]
    assert "PIPELINING" in connection.extensions
    connection.close()
    server.replies["LHLO"] = "502 5.5.1 this is SMTP"
    assert (await refused(server)).stage == "LHLO"
    assert server.connections[1].verbs == ["LHLO"]


@both_loops
async def test_helo_for_an_old_server(scripted: Scripted):
    """EHLO refused with 500 or 502 is followed by HELO: no extensions; any other refusal is final."""
    server = scripted({"EHLO": ["500 what?", "502 what?", "550 5.7.1 go away", "421 4.3.2 busy"]})
    for _ in range(2):
        connection = await opened(server)
        assert connection.extensions == {}
        await deliver(connection)
        connection.close()
    for code in (550, 421):
        error = await refused(server)
        assert error.stage == "EHLO"
        assert error.reply is not None
        assert error.reply.code == code
    server.replies |= {"EHLO": "502 no", "HELO": "550 no"}
    assert (await refused(server)).reply == Reply(550, ("no",))


@both_loops
@pytest.mark.parametrize(
    ("greeting", "reply"),
    [
        ("421 4.3.2 too busy", Reply(421, ("4.3.2 too busy",))),
        ("554 5.7.1 not\nyou \x1b", Reply(554, ("5.7.1 not", "you \\x1b"))),
        (b"SSH-2.0-OpenSSH\r\n", None),
        (Close(), None),
        (Reset(), None),
    ],
)
async def test_greetings(scripted: Scripted, greeting: object, reply: Reply | None):
    """A server that does not greet with 220 fails the greeting, with its reply if it gave one."""
    error = await refused(scripted({"CONNECT": greeting}))
    assert error.reply == reply
    # A reset may come before the connect has been noticed to be done.
    assert error.stage == "greeting" or (error.stage == "connect" and isinstance(greeting, Reset))


@both_loops
@pytest.mark.parametrize(
    ("key", "stage"), [("CONNECT", "greeting"), ("EHLO", "EHLO"), ("STARTTLS", "TLS"), ("TLS", "TLS"), ("AUTH", "AUTH")]
)
async def test_each_stage_has_a_deadline(scripted: Scripted, certificate: Certificate, key: str, stage: str):
    """A server that falls silent at any stage fails that stage in time."""
    server = scripted({key: Silence()}, tls=certificate.server_context(), extensions=["AUTH PLAIN"])
    destination = server.destination(tls="encrypt", username="u", password="p")
    with pytest.raises(ConnectFailed, match="no answer in time") as caught:
        await connect(destination, local_hostname="x", timeouts=Timeouts.of(0.6))
    assert caught.value.stage == stage


@both_loops
async def test_a_silent_server_behind_smtps(certificate: Certificate, scripted: Scripted):
    """A plain server on a TLS port fails at TLS, not at the greeting; a silent one does so in time."""
    server = scripted()
    with pytest.raises(ConnectFailed) as caught:
        await connect(server.destination(scheme="smtps"), local_hostname="x", timeouts=Timeouts.of(LONG))
    assert caught.value.stage == "TLS"
    silent = scripted({"CONNECT": Silence()})
    with pytest.raises(ConnectFailed) as caught:
        await connect(silent.destination(scheme="smtps"), local_hostname="x", timeouts=Timeouts.of(0.2))
    assert caught.value.stage == "TLS"


@both_loops
async def test_no_server(scripted: Scripted):
    """Nobody listening and a name that does not exist fail at connect, in words."""
    server = scripted()
    error = await refused(server, port=free_port())
    assert str(error) == "connect: Connection refused"
    error = await refused(server, host="nobody.invalid")
    assert error.stage == "connect"
    assert "cannot resolve" in error.reason


@both_loops
async def test_a_host_that_swallows_the_connection(scripted: Scripted):
    """A firewall that drops packets is a deadline missed, said in words; a full backlog is the same to us."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        server = scripted()
        server.port = full.getsockname()[1]
        with pytest.raises(ConnectFailed, match="no answer in time") as caught:
            await opened(server, 0.3)
        assert caught.value.stage == "connect"


@both_loops
async def test_the_next_address_is_tried(scripted: Scripted):
    """A name with several addresses connects to the one that answers."""
    server = scripted()
    assert (await opened(server, host="localhost")).is_usable


@both_loops
async def test_cancelled_while_connecting(scripted: Scripted):
    """A cancelled connect leaves no connection behind."""
    server = scripted({"EHLO": Silence()})
    connecting = asyncio.create_task(opened(server))
    await server.until(lambda: server.connections and server.connections[0].commands)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    # The server is silent for good and would not see it; a socket left open here fails the test as a ResourceWarning.
