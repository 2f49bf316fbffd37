"""One session: replies match commands in order, and every end of the connection raises the right error."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest

from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ConnectionGone, DeadlinePassed, MalformedReply
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts
from support.event_loops import at_end, both_loops
from support.reactions import Close, Gate, HalfClose, Reset, Silence, Trickle
from support.scripted_server import ScriptedServer
from support.waiting import until

Scripted = Callable[..., ScriptedServer]
LONG = 20.0
SHORT = 0.1
ENOUGH = 0.5  # for a reply that does come, and yet worth waiting out


async def opened(server: ScriptedServer, **options: Any) -> Connection:
    connection = await connect(
        server.destination(**options), local_hostname="relay.example", timeouts=Timeouts.of(LONG)
    )
    at_end.append(connection.close)
    return connection


async def in_data(server: ScriptedServer) -> Connection:
    """Return a connection whose server has said 354."""
    connection = await opened(server)
    connection.send(b"MAIL FROM:<a@example.com>", b"RCPT TO:<b@example.com>", b"DATA")
    assert [(await connection.reply(timeout=LONG)).code for _ in range(3)] == [250, 250, 354]
    connection.begin_data()
    return connection


@both_loops
async def test_transactions_one_after_the_other(scripted: Scripted):
    """Commands alone or pipelined, a body in pieces or at once, on one connection; then QUIT."""
    server = scripted({"MAIL": [None, "250-2.1.0 first\n250 second"], "RCPT TO:<no@": "550 5.1.1 nobody"})
    connection = await opened(server)
    assert await connection.command(b"MAIL FROM:<>", timeout=LONG) == Reply(250, ("2.1.0 ok",))
    assert (await connection.command(b"RCPT TO:<b@example.com>", timeout=LONG)).code == 250
    assert (await connection.command(b"DATA", timeout=LONG)).code == 354
    connection.begin_data()
    await connection.write_body(b"Subject: a\r\n", timeout=LONG)
    await connection.write_body(memoryview(b"\r\n..x\r\n"), timeout=LONG)
    assert not connection.is_usable
    assert (await connection.command(b".", timeout=LONG)).code == 250
    connection.end_data()
    assert connection.is_usable
    assert connection.transactions == 1

    connection.send(b"MAIL FROM:<c@example.com>", b"RCPT TO:<no@example.com>", b"RCPT TO:<d@example.com>", b"DATA")
    assert connection.replies_owed == 4
    assert await connection.reply(timeout=LONG) == Reply(250, ("2.1.0 first", "second"))
    assert await connection.reply(timeout=LONG) == Reply(550, ("5.1.1 nobody",))
    assert (await connection.reply(timeout=LONG)).code == 250
    assert (await connection.reply(timeout=LONG)).code == 354
    connection.begin_data()
    connection.end_body(b"at once\r\n")
    assert (await connection.reply(timeout=LONG)).is_positive
    connection.end_data()
    assert connection.is_usable
    assert not connection.is_dirty
    await connection.quit()
    assert not connection.is_open
    await server.until(lambda: server.connections[0].closed == "quit")
    assert [m.wire for m in server.messages] == [b"Subject: a\r\n\r\n..x\r\n", b"at once\r\n"]
    assert server.messages[1].recipients == ["d@example.com"]


@both_loops
async def test_an_empty_message(scripted: Scripted):
    """The dot right after DATA ends a message without a single octet."""
    server = scripted()
    connection = await in_data(server)
    connection.end_body()
    assert (await connection.reply(timeout=LONG)).code == 250
    assert server.messages[0].wire == b""


@both_loops
async def test_lmtp_owes_a_reply_for_each_recipient(scripted: Scripted):
    """After the dot there are as many replies as recipients, in their order."""
    server = scripted({".<c@example.com>": "452 4.2.2 full"}, lmtp=True)
    connection = await opened(server)
    connection.send(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"RCPT TO:<c@example.com>", b"DATA")
    for _ in range(4):
        await connection.reply(timeout=LONG)
    connection.begin_data()
    connection.end_body(b"x\r\n", replies=2)
    assert [(await connection.reply(timeout=LONG)).code for _ in range(2)] == [250, 452]
    connection.end_data()
    assert connection.is_usable


@both_loops
async def test_replies_octet_by_octet(scripted: Scripted):
    """A reply that trickles in is the same reply."""
    server = scripted({"NOOP": Trickle("250-schön\n250 ende", 0.001)})
    connection = await opened(server)
    assert await connection.command(b"NOOP", timeout=LONG) == Reply(250, ("schön", "ende"))


@both_loops
async def test_what_must_never_be_sent(scripted: Scripted):
    """Control characters, and in the DATA phase anything but the dot, are refused before a single octet goes out."""
    server = scripted()
    connection = await in_data(server)
    for line in (b"RCPT TO:<a@b>\r\nDATA", b"NOOP\n", b"NOOP \x00", b"NOOP\x7f"):
        with pytest.raises(ValueError, match="control"):
            connection.send(line)
    for line in (b"RSET", b"QUIT", b"NOOP"):
        with pytest.raises(RuntimeError, match="only the dot"):
            connection.send(line)
    with pytest.raises(RuntimeError, match="no reply is owed"):
        await connection.reply(timeout=LONG)
    await connection.quit()  # in this state that is a close
    await server.until(lambda: server.connections[0].closed == "eof")
    assert server.connections[0].verbs == ["EHLO", "MAIL", "RCPT", "DATA"]
    assert server.transactions[0].wire == b""


@both_loops
async def test_closed_while_a_reply_is_owed(scripted: Scripted):
    """EOF and reset give ConnectionGone with the stage; so does everything after it."""
    server = scripted({"MAIL": [Close(), Reset()]})
    for _ in range(2):
        connection = await opened(server)
        with pytest.raises(ConnectionGone) as caught:
            await connection.command(b"MAIL FROM:<>", timeout=LONG)
        assert caught.value.stage == "MAIL"
        assert caught.value.reply is None
        with pytest.raises(ConnectionGone):
            connection.send(b"RSET")
        with pytest.raises(ConnectionGone):
            await connection.write_body(b"x", timeout=LONG)
        assert not connection.is_usable
        await connection.quit()


@both_loops
async def test_pipelined_replies_before_the_end_count(scripted: Scripted):
    """Replies that came before the connection ended are returned in order; only the missing one is an error."""
    server = scripted({"RCPT": ("421 4.3.2 shutting down", Close())})
    connection = await opened(server)
    connection.send(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"DATA")
    await until(lambda: not connection.is_open)
    assert (await connection.reply(timeout=LONG)).code == 250
    assert (await connection.reply(timeout=LONG)).code == 421
    with pytest.raises(ConnectionGone) as caught:
        await connection.reply(timeout=LONG)
    assert caught.value.stage == "DATA"


@both_loops
@pytest.mark.parametrize("ending", [Close(), HalfClose()])
@pytest.mark.parametrize("last", [b"250 2.0.0 queued\r\n", b"250-2.0.0 queued\r\n", b"250-2.0.0 queued"])
async def test_the_last_reply_wins_over_the_close(scripted: Scripted, last: bytes, ending: object):
    """A server that closes right after its reply, or in the middle of its text, has replied."""
    server = scripted({".": (last, ending)})
    connection = await in_data(server)
    connection.end_body(b"x\r\n")
    assert await connection.reply(timeout=LONG) == Reply(250, ("2.0.0 queued",))
    connection.end_data()
    await until(lambda: not connection.is_usable)


@both_loops
@pytest.mark.parametrize("last", ["220 hello again", "221 2.0.0 bye", "354 go ahead", "199 what"])
async def test_what_is_no_yes_to_a_message(scripted: Scripted, last: str):
    """A greeting, a goodbye or a 354 in the place of the reply to the dot: out of step, and never a yes."""
    server = scripted({".": (last, b"250 2.0.0 queued\r\n")})
    connection = await in_data(server)
    connection.end_body(b"x\r\n")
    with pytest.raises(MalformedReply, match=last):
        await connection.reply(timeout=LONG)
    await until(lambda: not connection.is_open)


@both_loops
@pytest.mark.parametrize("half", [b"250-2.0.0 que", b"250-2.0.0 queued\r\n", b"250 2.0.0 queued", b"2"])
async def test_half_a_reply_before_the_dot(scripted: Scripted, half: bytes):
    """What has begun before the message ended is no answer to it, wherever it ends."""
    server = scripted({"DATA": b"354 go\r\n" + half})
    connection = await in_data(server)
    with pytest.raises(ConnectionGone, match="out of turn"):
        await connection.write_body(b"x\r\n", timeout=LONG)
    with pytest.raises(ConnectionGone, match="out of turn"):
        connection.end_body(b"y\r\n")


@both_loops
async def test_a_yes_before_the_dot_has_left(scripted: Scripted):
    """A server that says yes and has stopped reading cannot have seen the dot: it is still here."""
    stop, speak, end = Gate(), Gate(), Gate()
    server = scripted(in_data=(10, (stop, speak, b"250 2.0.0 queued\r\n", end)))
    stop.open()
    connection = await in_data(server)
    transport = connection._transport
    while not transport.get_write_buffer_size():
        await connection.write_body(b"x" * 65536, timeout=LONG)
    connection.end_body(b"x\r\n")
    speak.open()
    with pytest.raises(MalformedReply, match="no answer to the message"):
        await connection.reply(timeout=LONG)
    end.open()


@both_loops
async def test_a_reply_that_nobody_asked_for(scripted: Scripted):
    """An idle server's 421 makes the connection unusable, is kept as the reason, and answers no command."""
    server = scripted({"NOOP": [("250 ok", "421 4.4.2 idle for too long", Close()), b"250 ok\r\n250 once more\r\n"]})
    connection = await opened(server)
    assert (await connection.command(b"NOOP", timeout=LONG)).code == 250
    await until(lambda: not connection.is_usable)
    assert connection.early_reply == Reply(421, ("4.4.2 idle for too long",))
    with pytest.raises(ConnectionGone) as caught:
        await connection.command(b"MAIL FROM:<>", timeout=LONG)
    assert caught.value.reply == Reply(421, ("4.4.2 idle for too long",))
    assert connection.transactions == 0

    connection = await opened(server)
    assert (await connection.command(b"NOOP", timeout=LONG)).lines == ("ok",)
    await until(lambda: connection.early_reply is not None)
    assert not connection.is_usable
    with pytest.raises(ConnectionGone) as caught:
        await connection.command(b"RCPT TO:<b@example.com>", timeout=LONG)
    assert caught.value.stage == "RCPT"


@both_loops
@pytest.mark.parametrize("junk", [b"hello\r\n", b"250-a\r\n550 b\r\n", b"x" * 70_000, b"250-x\r\n" * 200])
async def test_not_smtp(scripted: Scripted, junk: bytes):
    """Octets that are no reply end the connection with MalformedReply."""
    server = scripted({"MAIL": (junk, Silence())})
    connection = await opened(server)
    for _ in range(2):
        with pytest.raises(MalformedReply):
            await connection.command(b"MAIL FROM:<>", timeout=LONG)
    assert not connection.is_usable


@both_loops
async def test_a_reply_before_the_junk_counts(scripted: Scripted):
    """The server accepted, whatever it says next; only what follows is malformed."""
    server = scripted({".": (b"250 2.0.0 queued\r\njunk\r\n", Silence())})
    connection = await in_data(server)
    connection.end_body(b"x\r\n")
    assert (await connection.reply(timeout=LONG)).code == 250
    connection.end_data()
    await until(lambda: not connection.is_usable)


@both_loops
async def test_a_flood_of_replies_ends_the_connection(scripted: Scripted):
    """A server that never stops talking is hung up on."""
    server = scripted({"NOOP": (b"250 ok\r\n" * 500, Silence())})
    connection = await opened(server)
    await connection.command(b"NOOP", timeout=LONG)
    await until(lambda: not connection.is_open)
    assert connection.early_reply == Reply(250, ("ok",))


@both_loops
async def test_half_a_line_makes_it_unusable(scripted: Scripted):
    """Octets without the end of their line are unasked for as well."""
    server = scripted({"NOOP": b"250 ok\r\n42"})
    connection = await opened(server)
    await connection.command(b"NOOP", timeout=LONG)
    await until(lambda: not connection.is_usable)
    assert connection.is_open


@both_loops
async def test_deadline(scripted: Scripted):
    """A silent server gives DeadlinePassed; the late reply is not taken for another command's."""
    gate = Gate()
    server = scripted({"MAIL": (gate, "250 late")})
    connection = await opened(server)
    with pytest.raises(DeadlinePassed, match=r"no reply within 0\.1 s") as caught:
        await connection.command(b"MAIL FROM:<>", timeout=SHORT)
    assert caught.value.stage == "MAIL"
    assert not connection.is_usable
    gate.open()
    assert (await connection.reply(timeout=LONG)).lines == ("late",)
    assert connection.is_usable


@both_loops
async def test_each_reply_has_its_own_deadline(scripted: Scripted):
    """A short deadline after a long one is short, and a long one after a short one is long."""
    gate = Gate()
    server = scripted({"RSET": Silence(), "NOOP": (gate, "250 ok")})
    connection = await opened(server)
    await connection.command(b"MAIL FROM:<>", timeout=ENOUGH)
    waiting = asyncio.ensure_future(connection.command(b"NOOP", timeout=LONG))
    await gate.arrival()
    loop = asyncio.get_running_loop()
    passed = loop.create_future()
    loop.call_later(1.5 * ENOUGH, passed.set_result, None)  # the short deadline of before is over
    await passed
    assert not waiting.done()
    gate.open()
    assert (await waiting).code == 250
    started = loop.time()
    with pytest.raises(DeadlinePassed):
        await connection.command(b"RSET", timeout=SHORT)
    assert loop.time() - started < LONG / 2


@both_loops
async def test_a_cancelled_wait_stays_owed(scripted: Scripted):
    """A reply whose wait was cancelled still answers its own command."""
    gate = Gate()
    server = scripted({"MAIL": (gate, "250 to mail"), "RCPT": "550 to rcpt"})
    connection = await opened(server)
    waiting = asyncio.ensure_future(connection.command(b"MAIL FROM:<>", timeout=LONG))
    await gate.arrival()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not connection.is_usable
    connection.send(b"RCPT TO:<b@example.com>")
    gate.open()
    assert (await connection.reply(timeout=LONG)).lines == ("to mail",)
    assert (await connection.reply(timeout=LONG)).lines == ("to rcpt",)


@both_loops
async def test_the_body_waits_for_a_slow_reader(scripted: Scripted):
    """A server that stops reading holds the writer back, with a bounded buffer, until its deadline."""
    gate = Gate()
    server = scripted(in_data=(1, gate))
    connection = await in_data(server)
    body = os.urandom(1 << 20).hex().encode() * 16  # 32 MiB
    writing = asyncio.create_task(connection.write_body(body, timeout=LONG))
    await gate.arrival()
    transport = connection._transport
    await until(lambda: transport.get_write_buffer_size() > 0)
    assert not writing.done()
    assert transport.get_write_buffer_size() <= 512 * 1024
    gate.open()
    await writing
    connection.end_body(b"\r\n")
    assert (await connection.reply(timeout=LONG)).code == 250
    assert server.messages[0].wire == body + b"\r\n"

    server.in_data = (1, Silence())
    connection = await in_data(server)
    with pytest.raises(DeadlinePassed) as caught:
        await connection.write_body(body, timeout=SHORT)
    assert caught.value.stage == "message body"
    connection.close()


@both_loops
async def test_an_early_reply_ends_the_body(scripted: Scripted):
    """A 552 before our dot stops a blocked writer, stays readable and is never taken for the answer to the dot."""
    server = scripted(in_data=(1, ("552 5.3.4 too big", Silence())))
    connection = await in_data(server)
    await connection.write_body(bytes(16 << 20), timeout=LONG)
    assert connection.early_reply == Reply(552, ("5.3.4 too big",))
    assert not connection.is_usable
    for write in (lambda: connection.write_body(b"x", timeout=LONG), lambda: connection.command(b".", timeout=LONG)):
        with pytest.raises(ConnectionGone) as caught:
            await write()
        assert caught.value.reply == Reply(552, ("5.3.4 too big",))
    with pytest.raises(ConnectionGone):
        connection.end_body()
    connection.close()


@both_loops
async def test_an_early_acceptance_is_none(scripted: Scripted):
    """A 250 before our dot accepts nothing."""
    server = scripted(in_data=(1, ("250 2.0.0 accepted?", None)))
    connection = await in_data(server)
    await connection.write_body(b"x\r\n", timeout=LONG)
    await until(lambda: connection.early_reply is not None)
    with pytest.raises(ConnectionGone):
        connection.end_body()
    connection.close()


@both_loops
@pytest.mark.parametrize("ending", [Close(), Reset()])
async def test_the_reason_is_read_although_the_write_failed(scripted: Scripted, ending: object):
    """The server refuses and closes while we do not look; the write fails, and its 552 is still found."""
    server = scripted(in_data=(1, ("552 5.3.4 too big", ending)))
    connection = await in_data(server)
    await connection.write_body(b"x" * 100, timeout=LONG)
    server.wait_until(lambda: server.connections[0].closed)  # blocks this loop: nothing is read meanwhile
    with pytest.raises(ConnectionGone) as caught:  # noqa: PT012 - one of them, whichever finds out
        for _ in range(100):
            await connection.write_body(bytes(1 << 20), timeout=LONG)
    assert caught.value.reply == Reply(552, ("5.3.4 too big",))
    assert connection.early_reply == caught.value.reply


@both_loops
@pytest.mark.parametrize("how", ["deadline", "cancelled"])
async def test_half_a_body_never_gets_its_dot(scripted: Scripted, how: str):
    """A body that could not be written in full cannot be ended; a close drops what the transport still holds."""
    gate = Gate()
    server = scripted(in_data=(1, gate))
    connection = await in_data(server)
    body = bytes(16 << 20)
    writing = asyncio.create_task(connection.write_body(body, timeout=SHORT if how == "deadline" else LONG))
    await gate.arrival()
    if how == "cancelled":
        writing.cancel()
    with pytest.raises((DeadlinePassed, asyncio.CancelledError)):
        await writing
    with pytest.raises(ConnectionGone, match="not written in full"):
        connection.end_body()
    with pytest.raises(ConnectionGone):
        connection.send(b".")
    connection.close()
    gate.open()
    await server.until(lambda: server.connections[0].closed)
    assert not server.messages
    assert len(server.transactions[0].wire) < len(body)


@both_loops
async def test_no_timer_outlives_its_use(scripted: Scripted):
    """A connection that ended leaves no timer behind; an idle one at most the one of its last deadline."""
    server = scripted()
    connection = await opened(server)
    await connection.command(b"NOOP", timeout=LONG)
    assert connection._timer is not None
    connection.close()
    await until(lambda: connection._timer is None)
    connection = await opened(server)
    await connection.command(b"NOOP", timeout=ENOUGH)
    await until(lambda: connection._timer is None)
    assert connection.is_usable
    connection.close()
