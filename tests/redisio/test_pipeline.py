"""A pipeline to Redis: every batch gets its own answers or one error, once, and the pool loses no connection."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as NoConnection

from relay.config.model import RedisSettings
from relay.redisio import clients, pipeline, raw_connection
from relay.redisio.pipeline import Answers, CommandBatch, Pipelines
from relay.redisio.replication import TooFewReplicas
from support.certificates import Certificate
from support.event_loops import both_loops
from support.redis_servers import RedisServer
from support.waiting import PATIENCE, until

LARGE = 3 << 20
FEW = 3  # connections that the pool of a test may have
HELLO = b"%1\r\n$5\r\nproto\r\n:3\r\n"


class Link:
    """One connection to the scripted server; they are numbered from 1."""

    def __init__(self, number: int, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.asked: list[list[bytes]] = []
        self._writer = writer
        self._serving = asyncio.current_task()

    async def ended(self) -> None:
        """Wait until it is served no more: who is cancelled by the loop's end is reported there."""
        if self._serving is not None and not self._serving.done():
            await asyncio.wait([self._serving], timeout=0.5)

    def say(self, octets: bytes) -> None:
        if not self._writer.is_closing():
            self._writer.write(octets)

    def end(self, octets: bytes = b"") -> None:
        """Close it in order, after these last words."""
        self._writer.write(octets)
        self._writer.close()

    def reset(self) -> None:
        """Close it with RST, as a host does that knows of no such connection."""
        if not self._writer.is_closing():
            now = struct.pack("ii", 1, 0)
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self._writer.transport.abort()


Answer = Callable[[Link, list[bytes]], Awaitable[bytes | None]]


class Script:
    """A server of Redis's protocol, and a client of it with few connections."""

    def __init__(self, client: redis.asyncio.Redis, links: list[Link]) -> None:
        self.client = client
        self.links = links

    @property
    def asked(self) -> list[list[list[bytes]]]:
        """What was asked on each connection."""
        return [link.asked for link in self.links]


@asynccontextmanager
async def scripted(
    answer: Answer, *, protocol: int = 3, patience: float = PATIENCE, tls: Certificate | None = None
) -> AsyncIterator[Script]:
    """``answer`` is asked for each command but the introduction's; None says nothing."""
    links: list[Link] = []
    told: list[BaseException] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, commands = Link(len(links) + 1, writer), hiredis.Reader()
        links.append(link)
        try:
            while data := await reader.read(65536):
                commands.feed(data)
                while (command := commands.gets()) is not False:
                    if command[0] in {b"HELLO", b"CLIENT"}:
                        writer.write(HELLO if command[0] == b"HELLO" else b"-ERR unknown\r\n")
                        continue
                    link.asked.append(command)
                    if said := await answer(link, command):
                        writer.write(said)
        except ConnectionError:
            pass
        except Exception as error:  # a fault of the script's
            told.append(error)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.server_context() if tls else None)
    port = server.sockets[0].getsockname()[1]
    secure: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(tls.certificate)} if tls else {}
    client = redis.asyncio.Redis(
        port=port, protocol=protocol, socket_timeout=patience, retry=None, max_connections=FEW, **secure
    )
    try:
        yield Script(client, links)
    finally:
        await client.aclose()
        server.close()
        for link in links:
            link.reset()
        await asyncio.sleep(0.01 if tls else 0)  # its end takes several turns of the loop
        for link in links:
            await link.ended()
    assert not told, told


def batch(*words: str) -> CommandBatch:
    made = CommandBatch()
    for word in words:
        made.add((word,))
    return made


async def answers_to(wires: Pipelines, asked: CommandBatch) -> Answers:
    """Return what ``answered`` is called with. Fails when it is called again before the loop comes to rest."""
    calls: list[Answers] = []
    wires.send(asked, calls.append)
    await until(lambda: calls)
    for _ in range(20):
        await asyncio.sleep(0)
    (answers,) = calls
    return answers


# Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("size", [0, LARGE])
@both_loops
async def test_each_change_has_its_own_answer(redis_url: str, protocol: int, size: int) -> None:
    """An error in one is not another's, wherever it comes: plain, in a script, at the door of a MULTI or in its end."""
    client = redis.asyncio.Redis.from_url(redis_url, protocol=protocol, socket_timeout=PATIENCE)
    body = os.urandom(size)
    asked = CommandBatch(size)
    asked.add(("SET", "text", body))
    asked.eval("return redis.call('INCR', 'text')", 0)
    asked.add(("GET", "nothing"))
    asked.transaction([("SET", "a", 1), ("INCR", "a")])
    asked.transaction([("INCR", "a"), ("NOSUCH",), ("INCR", "a")])
    asked.transaction([("INCR", "a"), ("INCR", "text"), ("GET", "nothing")])
    asked.eval("return {redis.call('GET', 'a'), false, 7}", 0)
    asked.add(("GET", "text"))
    answers = await answers_to(Pipelines(client), asked)
    assert isinstance(answers, list)
    done, script, nothing, multi, aborted, partly, several, text = answers
    assert (done, nothing, multi, several, text) == (b"OK", None, [b"OK", 2], [b"3", None, 7], body)
    assert isinstance(script, ResponseError)
    assert "not an integer" in str(script)
    assert isinstance(aborted, ResponseError)
    assert "NOSUCH" in str(aborted)
    assert isinstance(partly, ResponseError)
    assert "not an integer" in str(partly)
    await client.aclose()


@both_loops
async def test_an_answer_that_comes_octet_by_octet_is_one() -> None:
    """Nulls, booleans and what looks like no answer at all are answers; a push is none, wherever it comes."""
    spoken = b">2\r\n+news\r\n:1\r\n#f\r\n_\r\n>1\r\n+news\r\n$-1\r\n*0\r\n:0\r\n*2\r\n_\r\n-ERR within\r\n"

    async def answer(link: Link, command: list[bytes]) -> None:
        if command == [b"LAST"]:
            for octet in spoken:
                link.say(bytes([octet]))
                await asyncio.sleep(0.001)

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        *answers, last = await answers_to(wires, batch("A", "B", "C", "D", "E", "LAST"))
        assert answers == [False, None, None, [], 0]
        assert last[0] is None
        assert isinstance(last[1], ResponseError)
        script.links[0].say(b">1\r\n+news\r\n")
        again = await answers_to(wires, batch("A", "B", "C", "D", "E", "LAST"))
        assert again[:-1] == answers
        assert len(script.links) == 1


@both_loops
async def test_more_answers_than_questions_are_nobodys() -> None:
    """One that nobody asked for puts all in doubt: neither this batch nor the next takes what may be another's."""

    async def answer(link: Link, command: list[bytes]) -> bytes:
        return b":%d\r\n" % link.number + (command[0] == b"SURPLUS") * b":99\r\n" + (command[0] == b"BEGUN") * b":9"

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        for number, word in enumerate(("SURPLUS", "BEGUN"), 1):
            told = await answers_to(wires, batch("A", word))
            assert isinstance(told, InvalidResponse)
            assert script.links[-1].number == number  # not asked again
        assert await wires.ask(batch("A")) == [3]
        script.links[-1].say(b":99\r\n")
        await until(lambda: not any(wire.is_open for wire in wires._idle))
        assert await wires.ask(batch("A")) == [4]


@both_loops
async def test_what_is_not_the_protocol_ends_it() -> None:
    """Nonsense is told as such, is not asked for again, and what follows it is read by nobody."""

    async def answer(link: Link, command: list[bytes]) -> bytes:
        return b"nonsense\r\n:99\r\n" if link.number == 1 else b":2\r\n"

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        assert isinstance(await answers_to(wires, batch("A")), InvalidResponse)
        assert await wires.ask(batch("B")) == [2]
        assert script.asked == [[[b"A"]], [[b"B"]]]


@both_loops
async def test_too_few_or_late_answers_are_nobodys() -> None:
    """Who waits hears of it in time, and what comes after that is not the next one's, nor does it use up the pool."""

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        return b":%d\r\n" % link.number if command == [b"A"] else None

    async with scripted(answer) as script:
        wires = Pipelines(script.client, seconds=0.5)
        for _ in range(FEW + 1):
            told = await answers_to(wires, batch("A", "SILENT"))
            assert isinstance(told, TimeoutError)
            script.links[-1].say(b":99\r\n")
        assert await wires.ask(batch("A")) == [FEW + 2]
        assert all(asked == [[b"A"], [b"SILENT"]] for asked in script.asked[:-1])  # nothing was asked twice


@both_loops
async def test_who_gives_up_waiting_leaves_no_answer_behind() -> None:
    """The next one's is its own, and one connection is enough."""
    goes_on = asyncio.Event()

    async def answer(_: Link, command: list[bytes]) -> bytes:
        if command == [b"FIRST"]:
            await goes_on.wait()
        return b"+%b\r\n" % command[0]

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        first = asyncio.ensure_future(wires.ask(batch("FIRST")))
        await until(lambda: script.links and script.links[0].asked)
        first.cancel()
        goes_on.set()
        await asyncio.wait([first])
        assert await wires.ask(batch("SECOND")) == [b"SECOND"]
        await until(lambda: wires._idle)
        assert await wires.ask(batch("THIRD")) == [b"THIRD"]


@both_loops
async def test_a_fault_of_who_is_answered_is_its_own() -> None:
    """The loop is told, and the next batch is answered."""
    said: list[object] = []

    async def answer(*_: object) -> bytes:
        return b":1\r\n"

    def faulty(_: Answers) -> None:
        raise LookupError("unforeseen")

    async with scripted(answer) as script:
        loop, wires = asyncio.get_running_loop(), Pipelines(script.client)
        loop.set_exception_handler(lambda _, context: said.append(context.get("exception")))
        for _ in range(FEW + 1):
            wires.send(batch("A"), faulty)
            await until(lambda: said)
            assert isinstance(said.pop(), LookupError)
            assert await wires.ask(batch("B")) == [1]


# What is no change's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("when", ["at rest", "asked", "answering"])
@both_loops
async def test_a_lost_connection_is_replaced_once(when: str, how: str) -> None:
    """Whenever it is lost, the batch is sent again, as a whole, and answered once; the idle ones go with it."""

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        if command == [b"TWO"] and link.number < FEW and when != "at rest":
            if when == "answering":
                link.say(b"$5\r\nha")
            getattr(link, how)()
            return None
        return b":%d\r\n" % link.number

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        await asyncio.gather(wires.ask(batch("X")), wires.ask(batch("Y")))
        if when == "at rest":
            for link in script.links:
                getattr(link, how)()
        for number in (FEW, FEW) if when == "at rest" else (FEW,):
            assert await answers_to(wires, batch("ONE", "TWO")) == [number, number]
        assert sum([b"TWO"] in asked for asked in script.asked) == (1 if when == "at rest" else 2)


@both_loops
async def test_a_connection_that_is_lost_again_is_told_once() -> None:
    """The second loss is the answer, for each of many; no connection is kept, none is missing in the pool."""

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        if command == [b"A"]:
            link.end(b"$5\r\nha")
            return None
        return b":1\r\n"

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        for tries in range(1, FEW + 2):
            assert isinstance(await answers_to(wires, batch("A")), NoConnection)
            assert [asked for asked in script.asked if asked] == [[[b"A"]]] * (2 * tries)
        assert await asyncio.gather(*(wires.ask(batch("B")) for _ in range(FEW))) == [[1]] * FEW


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("how", ["end", "reset"])
@both_loops
async def test_one_that_was_lost_in_the_pool_is_not_waited_for(how: str, protocol: int) -> None:
    """A connection that Redis has closed while it was redis-py's is replaced before anything is asked on it."""

    async def answer(link: Link, command: list[bytes]) -> bytes:
        return b":%d\r\n" % link.number

    async with scripted(answer, protocol=protocol) as script:
        assert {*await asyncio.gather(*(script.client.execute_command("X") for _ in range(2)))} == {1, 2}
        for link in script.links:
            getattr(link, how)()
        pool = script.client.connection_pool
        await until(lambda: all(c._reader.at_eof() or c._reader.exception() for c in pool._available_connections))
        assert await Pipelines(script.client).ask(batch("A")) == [3]


@both_loops
async def test_nobody_there_is_told_at_once() -> None:
    """A Redis that takes no connection is NoConnection, as often as it is asked."""

    async def answer(*_: object) -> None:
        raise AssertionError

    async with scripted(answer) as script:
        script.client.connection_pool.connection_kwargs["port"] = 1
        for _ in range(FEW + 1):
            assert isinstance(await answers_to(Pipelines(script.client), batch("A")), NoConnection)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", BusyLoadingError),
        (b"-NOAUTH Authentication required.\r\n", AuthenticationError),
        (b"-READONLY You can't write against a read only replica.\r\n", NoConnection),
        (b"+OK\r\n+QUEUED\r\n*1\r\n-READONLY You can't write against a read only replica.\r\n", NoConnection),
        (b"+OK\r\n-LOADING Redis is loading\r\n-EXECABORT Transaction discarded\r\n", BusyLoadingError),
    ],
)
@both_loops
async def test_a_server_that_is_not_the_one_to_ask_is_left(said: bytes, kind: type[Exception]) -> None:
    """It may be another behind the same name, or the same in a moment: once more on a new connection, then told."""
    refusing = 1

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        if link.number <= refusing:
            return said if command in ([b"A"], [b"EXEC"]) else None
        return {b"A": b":1\r\n", b"EXEC": b"*1\r\n:1\r\n"}.get(command[0], b"+OK\r\n")

    def change() -> CommandBatch:
        made = CommandBatch()
        if said.startswith(b"-"):
            made.add(("A",))
        else:
            made.transaction([("INCR", "x")])
        return made

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        assert await answers_to(wires, change()) in ([1], [[1]])
        assert len(script.links) == 2
        script.links[1].reset()
        refusing = 99
        for _ in range(FEW + 1):
            told = await answers_to(wires, change())
            assert type(told) is kind


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"-OOM command not allowed when used memory > 'maxmemory'.\r\n", OutOfMemoryError),
        (b"-MISCONF Errors writing to the AOF file: No space left on device\r\n", ResponseError),
        (b"-NOPERM this user has no permissions\r\n", NoPermissionError),
    ],
)
@both_loops
async def test_a_refusal_is_one_changes_own(said: bytes, kind: type[Exception]) -> None:
    """What Redis will not do is asked once, is told who asked for it, and the connection stays."""

    async def answer(link: Link, command: list[bytes]) -> bytes:
        return said if command == [b"BAD"] else b":%d\r\n" % link.number

    async with scripted(answer) as script:
        wires = Pipelines(script.client)
        before, bad, after = await answers_to(wires, batch("A", "BAD", "B"))
        assert (before, type(bad), after) == (1, kind, 1)
        with pytest.raises(kind):
            await wires.ask(batch("A", "BAD", "B"))
        assert await wires.ask(batch("A")) == [1]


# Confirmed by replicas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "waited", "counts"), [("+OK", ":1", True), ("+OK", ":0", False), ("-OOM", ":1", False)]
)
@both_loops
async def test_what_too_few_replicas_have_does_not_count(mark: str, waited: str, counts: bool) -> None:
    """WAIT comes last, after a write of its own, without which it may be about nothing; their answers are nobody's."""

    async def answer(_: Link, command: list[bytes]) -> bytes:
        return {b"SET": mark, b"WAIT": waited}.get(command[0], ":7").encode() + b"\r\n"

    async with scripted(answer) as script:
        port = script.client.connection_pool.connection_kwargs["port"]
        server = RedisSettings(url=f"redis://127.0.0.1:{port}", timeout_seconds=5, replicas=1)
        client = clients.async_client(server, 5, confirmed=True)
        wires = Pipelines(client)
        for _ in range(2):
            answers = await answers_to(wires, batch("A", "B"))
            assert answers == [7, 7] if counts else isinstance(answers, RedisError)
        assert isinstance(answers, list) or (mark != "+OK") or isinstance(answers, TooFewReplicas)
        words = [command[0] for asked in script.asked for command in asked]
        assert words == [b"A", b"B", b"SET", b"WAIT"] * 2
        await client.aclose()


# Transports -------------------------------------------------------------------------------------------------------


@both_loops
async def test_tls_is_no_other(certificate: Certificate) -> None:
    """Large and small, one after the other; a loss is noticed at rest and in between, and nothing is left open."""

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        if command[0] == b"LOST" and link.number == 1:
            link.end(b":1")
            return None
        return b"$%d\r\n%b\r\n" % (len(command[-1]), command[-1])

    body = os.urandom(LARGE)
    async with scripted(answer, tls=certificate) as script:
        wires = Pipelines(script.client)
        large = CommandBatch(LARGE)
        large.add(("SET", "x", (body[:5], body[5:])))
        assert await wires.ask(large) == [body]
        assert await wires.ask(batch("LOST")) == [b"LOST"]
        assert await wires.ask(batch("A")) == [b"A"]
        assert len(script.links) == 2
        script.links[1].end()
        await until(lambda: not any(wire.is_open for wire in wires._idle))
        assert await wires.ask(batch("B")) == [b"B"]
        assert len(script.links) == 3


def test_certificates_are_looked_at(certificate: Certificate) -> None:
    """A server that the client has no reason to trust is not spoken to: the connections are redis-py's."""

    async def answer(*_: object) -> bytes:
        return b":1\r\n"

    async def ask() -> None:
        async with scripted(answer, tls=certificate) as script:
            script.client.connection_pool.connection_kwargs["ssl_ca_certs"] = ssl.get_default_verify_paths().cafile
            with pytest.raises(NoConnection, match="certificate"):
                await Pipelines(script.client).ask(batch("A"))

    asyncio.run(ask())


@both_loops
async def test_what_is_answered_is_let_go() -> None:
    """A large body is held while it is under way, for a second try, and by nothing when there is an answer or none."""

    async def answer(link: Link, command: list[bytes]) -> bytes | None:
        if link.number in {1, 3}:
            link.reset()
        return b":1\r\n" if link.number == 2 else None

    body = os.urandom(LARGE)
    held = sys.getrefcount(body)
    async with scripted(answer) as script:
        for is_answered in (True, False):
            wires = Pipelines(script.client, seconds=PATIENCE if is_answered else 1)
            asked = CommandBatch(LARGE)
            asked.add(("SET", "x", (body,)))
            answers = await answers_to(wires, asked)
            assert answers == [1] if is_answered else isinstance(answers, TimeoutError)
            del asked
            await until(lambda: sys.getrefcount(body) == held)


@both_loops
async def test_the_client_can_be_closed_while_wires_are_out() -> None:
    """At rest or asked: it ends in time, who waits is told, and nothing is left open."""
    asked = asyncio.Event()

    async def answer(_: Link, command: list[bytes]) -> bytes | None:
        if command == [b"SILENT"]:
            asked.set()
            return None
        return b":1\r\n"

    async with scripted(answer) as script:
        wires = Pipelines(script.client, seconds=0.2)
        await asyncio.gather(wires.ask(batch("A")), wires.ask(batch("B")))
        waiting = asyncio.ensure_future(wires.ask(batch("SILENT")))
        await asked.wait()
        async with asyncio.timeout(PATIENCE / 2):
            await script.client.aclose()
            with pytest.raises((RedisError, TimeoutError)):
                await waiting


# A real one -------------------------------------------------------------------------------------------------------


@both_loops
async def test_a_restart_goes_unnoticed(redis_factory: Callable[..., RedisServer]) -> None:
    """What was at rest when Redis went away is replaced; each of many batches after it is answered as its own."""
    server = redis_factory()
    client = redis.asyncio.Redis.from_url(server.url, socket_timeout=PATIENCE, max_connections=FEW)
    wires = Pipelines(client)
    for start in (0, 10, 20):
        for n in range(start, start + 10):
            found = await asyncio.gather(*(wires.ask(echo(f"{n} {i}")) for i in range(FEW)))
            assert found == [[f"{n} {i}".encode()] for i in range(FEW)]
        await asyncio.to_thread(server.kill)
        with pytest.raises(NoConnection):
            await wires.ask(echo("nobody"))
        await asyncio.to_thread(server.start)
    await client.aclose()


@both_loops
async def test_one_that_hangs_is_given_up_in_time(redis_factory: Callable[..., RedisServer]) -> None:
    """Asked, in the middle of a large write or on connecting; when it wakes up nobody takes its late answers."""
    server = redis_factory()
    client = redis.asyncio.Redis.from_url(server.url, socket_timeout=PATIENCE, max_connections=FEW)
    wires = Pipelines(client, seconds=0.2)
    await asyncio.gather(wires.ask(echo("a")), wires.ask(echo("b")))
    server.pause()
    large = CommandBatch(LARGE)
    large.add(("SET", "large", os.urandom(LARGE)))
    for asked in (echo("late"), large, echo("on connecting")):
        assert isinstance(await answers_to(wires, asked), TimeoutError)
    server.resume()
    for n in range(2 * FEW):
        assert await Pipelines(client).ask(echo(str(n))) == [str(n).encode()] if n == 0 else True
        assert await until_answered(wires, echo(f"again {n}")) == [f"again {n}".encode()]
    await client.aclose()


def echo(text: str) -> CommandBatch:
    made = CommandBatch()
    made.add(("ECHO", text))
    return made


async def until_answered(wires: Pipelines, asked: CommandBatch) -> list[Any]:
    """Ask until there is an answer: a server that has just been woken up has much to read."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        try:
            return await wires.ask(asked)
        except TimeoutError:
            assert asyncio.get_running_loop().time() < deadline


def test_a_connection_that_would_open_late_is_ended(redis_url: str) -> None:
    """A client can be closed at any moment of a connection's opening and of a batch, and nothing of it stays open."""

    async def closed_after(turns: int) -> None:
        client = clients.async_client(RedisSettings(redis_url, 5), 5)
        pipelines = Pipelines(client)
        asked = asyncio.ensure_future(pipelines.ask(batch("TIME")))
        for _ in range(turns):
            await asyncio.sleep(0)
        asked.cancel()
        await pipelines.close()
        await client.aclose()
        with pytest.raises(NoConnection, match="closed"):
            await pipelines.ask(batch("TIME"))

    for turns in range(16):
        asyncio.run(closed_after(turns))
        gc.collect()  # what is open complains


@pytest.mark.parametrize("kept", [False, True])
async def test_who_asks_when_the_client_ends_gets_an_answer(redis_url: str, *, kept: bool) -> None:
    """At whatever moment it ends, of a connection's opening or of a batch on a kept one: nobody waits for ever."""
    for turns in range(30):
        client = clients.async_client(RedisSettings(redis_url, 5), 5)
        pipelines = Pipelines(client)
        if kept:
            await pipelines.ask(batch("TIME"))
        asked = asyncio.gather(*(pipelines.ask(batch("TIME")) for _ in range(3)), return_exceptions=True)
        for _ in range(turns):
            await asyncio.sleep(0)
        await pipelines.close()
        await client.aclose()
        async with asyncio.timeout(PATIENCE):
            answers = await asked
        assert all(isinstance(answer, NoConnection | list) for answer in answers)


@both_loops
@pytest.mark.parametrize("taken_over", [False, True])
async def test_a_connection_that_is_lost_as_soon_as_it_is_made(
    taken_over: bool, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is sent once more over another one, whether that was before the pipeline had it or just after."""
    lost = 0

    async def living(pool: Any) -> Any:
        nonlocal lost
        connection = await raw_connection.living(pool)
        if not lost:
            lost += 1
            transport = raw_connection.transport(connection)
            if taken_over:
                asyncio.get_running_loop().call_soon(transport.abort)
            else:
                transport.abort()
                await asyncio.sleep(0.05)
        return connection

    monkeypatch.setattr(pipeline, "living", living)
    client = redis.asyncio.Redis.from_url(redis_url)
    pipelines = Pipelines(client, seconds=PATIENCE)
    batch = CommandBatch()
    batch.add(("PING",))
    try:
        answer = await asyncio.wait_for(pipelines.ask(batch), PATIENCE)
        assert answer == [b"PONG"]
        assert lost == 1
    except NoConnection:
        assert not taken_over  # it was never sent: the caller tries again
    finally:
        await pipelines.close()
        await client.aclose()
