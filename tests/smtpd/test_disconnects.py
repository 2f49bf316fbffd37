"""A session that is broken off, slow or long at any stage: nothing half-done becomes mail, and nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from support.certificates import Certificate
from support.dialogue import AsyncDialogue
from support.event_loops import both_loops
from support.in_process_relay import serve, settings_of
from support.product import Product
from support.reactions import Close, Gate, HalfClose, Reset, Trickle
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import until

Make = Callable[..., Product]

HELLO = b"EHLO x\r\n"
MAIL = HELLO + b"MAIL FROM:<half@example.com>\r\n"
RCPT = MAIL + b"RCPT TO:<b@example.com>\r\n"
STAGES = {
    "connected": b"",
    "in a command": b"EHL",
    "greeted": HELLO,
    "in AUTH": HELLO + b"AUTH LOGIN\r\n",
    "at the password": HELLO + b"AUTH LOGIN\r\nYW5u\r\n",
    "in STARTTLS": HELLO + b"STARTTLS\r\n",
    "in a handshake": HELLO + b"STARTTLS\r\n\x16\x03\x01\x02\x00",
    "in MAIL": MAIL[:-3],
    "after MAIL": MAIL,
    "after RCPT": RCPT,
    "after DATA": RCPT + b"DATA\r\n",
    "in a body": RCPT + b"DATA\r\nSubject: half\r\n\r\ntext\r\n",
    "in a large body": RCPT + b"DATA\r\n" + b"x" * 998 + b"\r\n" * 300,
    "before the end of data": RCPT + b"DATA\r\ntext\r\n.",
    "in the end of data": RCPT + b"DATA\r\ntext\r\n.\r",
    "in a BDAT command": RCPT + b"BDAT 10",
    "in a chunk": RCPT + b"BDAT 10 LAST\r\n12345",
    "between chunks": RCPT + b"BDAT 5\r\n12345",
    "in a chunk nobody wants": HELLO + b"BDAT 100000 LAST\r\nMAIL FROM:<half@example.com>\r\n",
}


@pytest.fixture
def chunking(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    return scripted(extensions=[*EXTENSIONS, "CHUNKING", "DSN"])


@both_loops
@pytest.mark.parametrize("way", ["close", "reset", "half-close"])
async def test_broken_off(
    chunking: ScriptedServer, redis_url: str, certificate: Certificate, tmp_path: Path, way: str
) -> None:
    """However and wherever a client goes, its session ends, nothing of it is mail, and the next client is served."""
    users = tmp_path / "users"
    users.write_text("")
    settings = {
        "smtp.users_file": str(users),
        "smtp.auth_without_tls": "true",
        "smtp.tls_certificate": str(certificate.certificate),
        "smtp.tls_key": str(certificate.key),
    }
    async with serve(settings_of(chunking.address, settings), redis_url) as (made, port):
        loop = asyncio.get_running_loop()
        for said in STAGES.values():
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setblocking(False)
                await loop.sock_sendall(client, said)
                await until(lambda: made.command_loops)
                if way == "reset":
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif way == "half-close":
                    client.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionError):
                        while await asyncio.wait_for(loop.sock_recv(client, 65536), 20):
                            pass
            await until(lambda: not made.command_loops)
        async with await AsyncDialogue.open(port) as client:
            await client.hello()
            await client.mail("whole@example.com", "b@example.com")
        await until(lambda: not made.command_loops)
        assert (made.counters.clients, made.counters.octets, made.snapshot.primary.pool.in_use) == (0, 0, 0)
    assert [message.sender for message in chunking.messages] == ["whole@example.com"]


@both_loops
@pytest.mark.parametrize("ending", [Close(), HalfClose(), Reset()], ids=["close", "half-close", "reset"])
@pytest.mark.parametrize("stage", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "early", ".", "RSET"])
async def test_primary_breaks_off(chunking: ScriptedServer, redis_url: str, stage: str, ending: object) -> None:
    """However and wherever the primary goes, the client hears 451 and may go on; then all is well again."""
    async with serve(settings_of(chunking.address), redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        if stage == "early":
            chunking.in_data = (500, ending)
        else:
            chunking.replies[stage] = ending
        await client.hello()
        reply = await client.say("MAIL FROM:<a@example.com>")
        if stage == "RSET":
            assert reply.startswith("250")
            await client.say("RSET", 250)
        else:
            for line, code in (
                (b"RCPT TO:<b@example.com>", "250"),
                (b"DATA", "250"),
                (b"x" * 900_000 + b"\r\n.", "354"),
            ):
                if reply.startswith(code):
                    reply = await client.say(line)
            assert reply.startswith("451 4.")
        chunking.replies.clear()
        chunking.in_data = None
        await client.say("RSET", 250)
        await client.mail("b@example.com", "b@example.com")
    assert [message.sender for message in chunking.messages] == ["b@example.com"]


@both_loops
@pytest.mark.parametrize(
    "said", [RCPT + b"BDAT 10\r\n123", RCPT + b"BDAT 3\r\n123", HELLO + b"AUTH PLAIN\r\n", MAIL + b"DA"]
)
async def test_idle(chunking: ScriptedServer, redis_url: str, tmp_path: Path, said: bytes) -> None:
    """Silence in a chunk, between two, in an exchange of AUTH or in a line: 421, and nothing is held any longer."""
    users = tmp_path / "users"
    users.write_text("")
    settings = {"smtp.idle_timeout": "1", "smtp.lease_idle_timeout": "1"}
    settings |= {"smtp.users_file": str(users), "smtp.auth_without_tls": "true"}
    async with serve(settings_of(chunking.address, settings), redis_url) as (made, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        heard = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        assert heard.endswith(b"\r\n421 4.4.2 Timeout while waiting for you\r\n")
        await until(lambda: not made.command_loops)
    assert not chunking.messages


@both_loops
@pytest.mark.parametrize("start", [b"DATA\r\n", b"BDAT 1000000\r\n", b"BDAT 1\r\nx"], ids=["data", "bdat", "chunks"])
async def test_slow_loris(chunking: ScriptedServer, redis_url: str, start: bytes) -> None:
    """An octet now and then, or a chunk of one, is not a message at a bearable pace: 421 long before its end."""
    settings = {"smtp.idle_timeout": "1", "smtp.min_data_rate": "500"}
    async with serve(settings_of(chunking.address, settings), redis_url) as (made, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(RCPT + start)

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x" if b"BDAT 1\r" not in start else b"BDAT 1\r\nx")
                    await writer.drain()
                    await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        heard = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(15):
                while piece := await reader.read(65536):
                    heard += piece
        dripping.cancel()
        writer.close()
        assert b"\r\n421 4.4.2 " in heard
        await until(lambda: not made.command_loops)
    assert not chunking.messages


@both_loops
async def test_an_octet_at_a_time(chunking: ScriptedServer, redis_url: str) -> None:
    """Commands, a body and chunks of which each octet is a packet; replies of the primary likewise."""
    for key, text in {
        "MAIL": "250-2.1.0 one\n250 2.1.0 ok",
        "RCPT": "250 2.1.5 ok",
        "DATA": "354 go",
        ".": "250 2.0.0 q",
    }.items():
        chunking.replies[key] = Trickle(text, 0.0005)
    chunking.replies["CONNECT"] = Trickle("220-a\n220 b ESMTP", 0.0005)
    async with serve(settings_of(chunking.address), redis_url) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        talk = RCPT + b"DATA\r\n..x\r\n.\r\n" + RCPT + b"BDAT 3\r\n.y\rBDAT 1 LAST\r\n\nQUIT\r\n"
        for octet in talk:
            writer.write(bytes([octet]))
            await writer.drain()
            await asyncio.sleep(0)
        heard = await asyncio.wait_for(reader.read(), 20)
        writer.close()
    codes = [line[:4] for line in heard.split(b"\r\n") if line and line[3:4] == b" "]
    assert codes == [b"%d " % n for n in (220, 250, 250, 250, 354, 250, 250, 250, 250, 250, 250, 221)]
    assert [m.content for m in chunking.messages] == [b".x\r\n", b".y\r\n"]


def test_a_thousand_recipients(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A thousand recipients in one transaction, pipelined; the next is one too many. The copy is for all of them."""
    backup.replies["MAIL"] = [Trickle("250 2.1.0 ok", 0.001), None]
    made = product(primary=primary.address, backups=[backup.address], settings={"retry.first": "1"})
    addresses = [f"r{n}@example.com" for n in range(1001)]
    with made.dialogue() as client:
        client.hello()
        client.raw(b"MAIL FROM:<a@example.com>\r\n" + b"".join(b"RCPT TO:<%s>\r\n" % a.encode() for a in addresses))
        client.expect(250)
        for _ in addresses[:1000]:
            client.expect(250)
        client.expect("452 4.5.3")
        client.body(b"Subject: all\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.recipients == primary.messages[0].recipients == addresses[:1000]


def test_a_thousand_messages_in_one_packet(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A thousand messages, sent before the first reply is read."""
    made = product(primary=primary.address, backups=[backup.address])
    with made.dialogue() as client:
        one = b"MAIL FROM:<s%d@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nSubject: %d\r\n\r\n.\r\n"
        client.raw(HELLO + b"".join(one % (n, n) for n in range(1000)) + b"QUIT\r\n")
        client.expect(250)
        for _ in range(1000):
            for code in (250, 250, 354, 250):
                client.expect(code)
        client.expect(221)
    copies = backup.wait_for(1000, timeout=60)
    assert sorted(int(c.header("Subject") or -1) for c in copies) == list(range(1000))


def test_a_reply_that_comes_late(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Who half-closes behind its dot waits for the answer, and gets it."""
    gate = Gate()
    primary.replies["."] = (gate, None)
    made = product(primary=primary.address, backups=[backup.address])
    with made.dialogue() as client:
        client.raw(RCPT + b"DATA\r\nSubject: x\r\n\r\n.\r\n")
        client.sock.shutdown(socket.SHUT_WR)
        gate.wait()
        gate.open()
        for code in (250, 250, 250, 354, 250):
            client.expect(code)
        assert client.is_closed()
    backup.wait_for(1)
