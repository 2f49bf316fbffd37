"""A real SMTP (or LMTP) server on loopback that does what a test's script says, and records all it is told.

It runs an event loop in a thread of its own, so that it serves tests with and without a loop alike. An error
in the server itself is raised by ``stop``: no test passes on a broken server.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from reactions import Close, Delay, Gate, HalfClose, Moment, Reaction, Reset, Silence, Trickle, wire
from relay.envelope import Destination
from waiting import PATIENCE

T = TypeVar("T")

EXTENSIONS = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
_TRACE = re.compile(
    rb"(?:(?:Received|Return-Path|Delivered-To|X-Original-To):[^\r\n]*\r?\n(?:[ \t][^\r\n]*\r?\n)*)*", re.IGNORECASE
)


class _Gone(Exception):
    """The connection has ended, by the client or by the script."""


@dataclass
class Transaction:
    """One MAIL with what followed. ``wire`` is the body as received, dot-stuffed, without the end-of-data line."""

    sender: str
    parameters: tuple[str, ...] = ()
    recipients: list[str] = field(default_factory=list)
    recipient_parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    xforward: dict[str, str] = field(default_factory=dict)
    wire: bytes = b""
    replies: list[str] = field(default_factory=list)  # after the dot; one, or with LMTP one per recipient
    accepted: bool = False  # after the dot, for at least one recipient
    connection: int = 0  # its index in ``ScriptedServer.connections``

    @property
    def body(self) -> bytes:
        """The message as it was before dot-stuffing."""
        return re.sub(rb"(\A|\r\n)\.", rb"\1", self.wire)

    @property
    def content(self) -> bytes:
        """The message without the trace lines (Received, Return-Path...) on top."""
        return self.body[_TRACE.match(self.body).end() :]  # type: ignore[union-attr]

    @property
    def trace(self) -> bytes:
        """The trace lines on top."""
        return self.body[: len(self.body) - len(self.content)]

    def header(self, name: str) -> str | None:
        """Return the first header of this name, unfolded, or None."""
        head = self.body.partition(b"\r\n\r\n")[0] + b"\r\n"
        found = re.search(
            rb"^%s:[ \t]*(.*?)\r\n(?![ \t])" % re.escape(name.encode()), head, re.IGNORECASE | re.DOTALL | re.MULTILINE
        )
        return re.sub(rb"\r\n", b"", found[1]).decode("utf-8", "surrogateescape") if found else None


@dataclass
class Connection:
    """What one client said: ``received`` raw, ``commands`` line by line, its transactions, and how it ended."""

    index: int
    received: bytearray = field(default_factory=bytearray)
    sent: bytearray = field(default_factory=bytearray)
    commands: list[str] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    helo: str = ""
    tls: bool = False
    login: tuple[str, str] | None = None
    pipelined: bool = False  # something came before the reply to the command in front of it
    bare_line_ends: bool = False
    closed: str = ""  # "quit", "eof" (by the client without QUIT), "script", "stopped"; "" while it is open

    @property
    def verbs(self) -> list[str]:
        return [command.split(" ")[0].upper() for command in self.commands]


class ScriptedServer:
    """A server whose normal behaviour is to accept everything, except where ``replies`` says otherwise.

    ``replies`` maps the beginning of a command line (case-insensitive, the longest one counts) to a reaction (see
    ``reactions``): ``{"RCPT TO:<bad@example.com>": "550 5.1.1 no", "DATA": Silence()}``. Special keys: ``CONNECT``
    (instead of the greeting), ``.`` (the end of data; with LMTP also ``.<address>``), ``TLS`` (after STARTTLS's 220).
    ``in_data = (octets, reaction)`` happens as soon as so many octets of a body have been received: an early reply
    (then nothing is said at the dot), a Gate (the server stops reading), a Reset. ``replies`` and ``in_data`` may be
    changed at any time. ``max_connections`` greets those above it with 421.
    """

    def __init__(
        self,
        replies: Mapping[str, Reaction] | None = None,
        *,
        extensions: Iterable[str] = EXTENSIONS,
        greeting: str = "220 scripted.example ESMTP",
        in_data: tuple[int, Reaction] | None = None,
        lmtp: bool = False,
        max_connections: int | None = None,
        tls: ssl.SSLContext | None = None,
        implicit_tls: bool = False,
        port: int = 0,
    ) -> None:
        self.replies: dict[str, Reaction] = dict(replies or {})
        self.extensions = list(extensions) + (["STARTTLS"] if tls and not implicit_tls else [])
        self.greeting = greeting
        self.in_data = in_data
        self.lmtp = lmtp
        self.max_connections = max_connections
        self.tls = tls
        self.implicit_tls = implicit_tls
        self.host = "127.0.0.1"
        self.port = port
        self.connections: list[Connection] = []
        self.errors: list[BaseException] = []
        self._turns: dict[str, tuple[list[Any], int]] = {}
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-server", daemon=True)

    # Life

    def start(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def stop(self) -> None:
        """End the server and all its connections, and raise what went wrong inside it."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self.refuse()
            self._call(self._end_all())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
        self._loop.close()
        if self.errors:
            raise AssertionError(f"the scripted server failed: {self.errors[0]!r}") from self.errors[0]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def listen(self) -> None:
        """Accept connections (again), always on the same port."""
        if self._server is None:
            self._server = self._call(self._listen())
            self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Stop listening, so that new connections are refused; the open ones go on."""
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._server.close)
            self._server = None
            self._call(asyncio.sleep(0))

    def drop(self) -> None:
        """Close all open connections at once, as a restart of the server does."""
        self._call(self._end_all())

    def down(self) -> None:
        """Refuse new connections and drop the open ones; ``listen`` brings it back."""
        self.refuse()
        self.drop()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def destination(self, name: str = "scripted", **options: Any) -> Destination:
        """Return this server as a Destination."""
        scheme = "lmtp" if self.lmtp else "smtps" if self.implicit_tls else "smtp"
        return Destination(**{"name": name, "host": self.host, "port": self.port, "scheme": scheme, **options})

    # What it has seen

    @property
    def transactions(self) -> list[Transaction]:
        """Every transaction of every connection, in the order of their MAIL on each connection."""
        with self._changed:
            return [t for connection in self.connections for t in connection.transactions]

    @property
    def messages(self) -> list[Transaction]:
        """The transactions that were accepted, in no promised order."""
        return [t for t in self.transactions if t.accepted]

    @property
    def commands(self) -> list[str]:
        with self._changed:
            return [command for connection in self.connections for command in connection.commands]

    @property
    def open_connections(self) -> int:
        with self._changed:
            return sum(not connection.closed for connection in self.connections)

    def wait_for(self, count: int = 1, timeout: float = PATIENCE) -> list[Transaction]:
        """Wait until so many messages have been accepted, and return all of them. Not for use in an event loop."""
        self.wait_until(
            lambda: len(self.messages) >= count, timeout, lambda: f"{len(self.messages)} of {count} messages came"
        )
        return self.messages

    async def arrived(self, count: int = 1, timeout: float = PATIENCE) -> list[Transaction]:
        """Like ``wait_for``, for tests in an event loop."""
        return await asyncio.to_thread(self.wait_for, count, timeout)

    def wait_until(
        self, predicate: Callable[[], T], timeout: float = PATIENCE, message: Callable[[], str] | str = ""
    ) -> T:
        """Wait until predicate, looked at after everything that the server does, is true."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (result := predicate()):
                if not self._changed.wait(deadline - time.monotonic()):
                    text = message() if callable(message) else message
                    raise AssertionError(f"not within {timeout:g} s: {text or predicate}; commands: {self.commands}")
            return result

    async def until(
        self, predicate: Callable[[], T], timeout: float = PATIENCE, message: Callable[[], str] | str = ""
    ) -> T:
        """Like ``wait_until``, for tests in an event loop."""
        return await asyncio.to_thread(self.wait_until, predicate, timeout, message)

    # Inside

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(
            self._serve, self.host, self.port, backlog=1000, ssl=self.tls if self.implicit_tls else None
        )

    async def _end_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with self._changed:
            connection = Connection(len(self.connections), tls=self.implicit_tls)
            self.connections.append(connection)
            self._changed.notify_all()
        ended = "stopped"
        try:
            ended = await _Conversation(self, connection, reader, writer).run()
        except asyncio.CancelledError:
            pass  # our own end is no error
        except (OSError, ssl.SSLError):
            ended = "eof"
        except Exception as error:  # shown by stop()
            self.errors.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()
            with self._changed:
                connection.closed = ended
                self._changed.notify_all()

    def _reaction(self, key: str, line: str, connection: Connection) -> Reaction:
        """Return what the script has for this, a list's turn taken and a callable called; None: nothing."""
        found: Any = self.replies.get(key)
        while True:
            if isinstance(found, list):
                of, turn = self._turns.get(key, (found, 0))
                turn = turn if of is found else 0  # the test has put a new list there
                self._turns[key] = (found, turn + 1)
                found = found[min(turn, len(found) - 1)]
            elif callable(found):
                found = found(Moment(line, connection))
            else:
                return found  # type: ignore[no-any-return]

    def _key_for(self, line: str) -> str:
        upper = line.upper()
        keys = (k for k in list(self.replies) if k not in {".", "CONNECT"} and upper.startswith(k.upper()))
        return max(keys, key=len, default="")


class _Conversation:
    """One connection, one command after the other."""

    def __init__(
        self, server: ScriptedServer, record: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.record = record
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.transaction: Transaction | None = None
        self.xforward: dict[str, str] = {}

    async def run(self) -> str:
        try:
            await self._greet()
            while True:
                line = await self._line()
                with self.server._changed:
                    self.record.commands.append(line)
                    self.record.pipelined |= bool(self.buffer)
                    self.server._changed.notify_all()
                if await self._command(line):
                    return "quit"
        except _Gone as end:
            return str(end)

    async def _greet(self) -> None:
        limit = self.server.max_connections
        if limit is not None and self.server.open_connections > limit:
            await self._do("421 4.3.2 too many connections")
            raise _Gone("script")
        await self._do(self.server._reaction("CONNECT", "", self.record), self.server.greeting)

    async def _command(self, line: str) -> bool:
        verb = line.split(" ", maxsplit=1)[0].upper()
        scripted = self.server._reaction(self.server._key_for(line), line, self.record)
        handle = getattr(self, f"_on_{verb.lower()}", None)
        if handle is None:
            await self._do(scripted, "500 5.5.2 unknown command")
        else:
            await handle(line, scripted)
        return verb == "QUIT"

    async def _on_ehlo(self, line: str, scripted: Reaction) -> None:
        self.transaction = None
        self.record.helo = line.partition(" ")[2]
        extensions = [x for x in self.server.extensions if not (x == "STARTTLS" and self.record.tls)]
        await self._do(scripted, "\n".join(["250 scripted.example", *extensions]))

    _on_lhlo = _on_ehlo

    async def _on_helo(self, line: str, scripted: Reaction) -> None:
        self.transaction = None
        self.record.helo = line.partition(" ")[2]
        await self._do(scripted, "250 scripted.example")

    async def _on_starttls(self, _: str, scripted: Reaction) -> None:
        if self.server.tls is None or self.record.tls:
            await self._do(scripted, "502 5.5.1 not offered")
        elif (await self._do(scripted, "220 2.0.0 go ahead")).startswith("220"):
            await self._do(self.server._reaction("TLS", "", self.record))
            self.buffer.clear()  # what was injected before TLS must not count after it
            await self.writer.start_tls(self.server.tls)
            self.record.tls = True

    async def _on_auth(self, line: str, scripted: Reaction) -> None:
        words = line.split(" ")
        if words[1].upper() == "PLAIN":
            given = words[2] if len(words) > 2 else await self._ask("334 ")
            _, user, password = base64.b64decode(given).decode().split("\0")
            self.record.login = (user, password)
        elif words[1].upper() == "LOGIN":
            user = words[2] if len(words) > 2 else await self._ask("334 VXNlcm5hbWU6")
            password = await self._ask("334 UGFzc3dvcmQ6")
            self.record.login = (base64.b64decode(user).decode(), base64.b64decode(password).decode())
        else:
            scripted = scripted or "504 5.5.4 unknown mechanism"
        await self._do(scripted, "235 2.7.0 welcome")

    async def _on_xforward(self, line: str, scripted: Reaction) -> None:
        self.xforward |= {name.upper(): value for name, _, value in (w.partition("=") for w in line.split(" ")[1:])}
        await self._do(scripted, "250 2.0.0 ok")

    async def _on_mail(self, line: str, scripted: Reaction) -> None:
        if self.transaction is not None:
            await self._do(scripted, "503 5.5.1 nested MAIL")
            return
        sender, parameters = _path(line)
        new = Transaction(sender, parameters, xforward=self.xforward, connection=self.record.index)
        if (await self._do(scripted, "250 2.1.0 ok")).startswith("2"):
            self.transaction, self.xforward = new, {}
            with self.server._changed:
                self.record.transactions.append(new)

    async def _on_rcpt(self, line: str, scripted: Reaction) -> None:
        if self.transaction is None:
            await self._do(scripted, "503 5.5.1 MAIL first")
            return
        address, parameters = _path(line)
        if (await self._do(scripted, "250 2.1.5 ok")).startswith("2"):
            self.transaction.recipients.append(address)
            self.transaction.recipient_parameters[address] = parameters
        else:
            self.transaction.refused.append(address)

    async def _on_data(self, _: str, scripted: Reaction) -> None:
        if self.transaction is None:
            await self._do(scripted, "503 5.5.1 MAIL first")
        elif not self.transaction.recipients:
            await self._do(scripted, "554 5.5.1 no valid recipients")
        elif (await self._do(scripted, "354 go ahead")).startswith("354"):
            answered = await self._body(self.transaction)
            await self._end_of_data(self.transaction, answered)

    async def _on_bdat(self, line: str, scripted: Reaction) -> None:
        words = line.split(" ")
        while len(self.buffer) < int(words[1]):
            await self._read()
        chunk = bytes(self.buffer[: int(words[1])])
        del self.buffer[: len(chunk)]
        if self.transaction is None or not self.transaction.recipients:
            await self._do(scripted, "503 5.5.1 RCPT first")
            return
        self.transaction.wire += chunk
        if words[-1].upper() == "LAST":
            stuffed = re.sub(rb"(\A|\r\n)\.", rb"\1..", self.transaction.wire)
            self.transaction.wire = stuffed
            await self._end_of_data(self.transaction, answered=False)
        else:
            await self._do(scripted, "250 2.0.0 chunk ok")

    async def _on_rset(self, _: str, scripted: Reaction) -> None:
        if (await self._do(scripted, "250 2.0.0 ok")).startswith("2"):
            self.transaction = None

    async def _on_noop(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "250 2.0.0 ok")

    async def _on_vrfy(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "252 2.0.0 maybe")

    async def _on_quit(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "221 2.0.0 bye")

    async def _body(self, transaction: Transaction) -> bool:
        """Read up to CRLF.CRLF, strictly; say whether the script answered early."""
        answered = False
        interruption = self.server.in_data
        searched = 0
        while True:
            # The CRLF of the DATA line counts as the one before a lone dot that follows at once.
            if self.buffer.startswith(b".\r\n"):
                end, after = 0, 3
                break
            if (found := self.buffer.find(b"\r\n.\r\n", max(0, searched - 4))) >= 0:
                end, after = found + 2, found + 5
                break
            searched = len(self.buffer)
            if interruption is not None and len(self.buffer) >= interruption[0]:
                transaction.wire = bytes(self.buffer)
                reaction, interruption = interruption[1], None
                answered = bool(await self._do(_called(reaction, Moment("", self.record))))
            try:
                await self._read()
            except _Gone:
                transaction.wire = bytes(self.buffer)
                raise
        transaction.wire = bytes(self.buffer[:end])
        del self.buffer[:after]
        return answered

    async def _end_of_data(self, transaction: Transaction, answered: bool) -> None:
        self.transaction = None
        if answered:
            return
        for key in [f".<{address}>" for address in transaction.recipients] if self.server.lmtp else ["."]:
            found = self.server._reaction(key, key, self.record)
            if found is None and key != ".":
                found = self.server._reaction(".", key, self.record)
            # Recorded before the reply is sent: who has seen the reply finds the message here.
            reply = await self._do(found, "250 2.0.0 queued", lambda text: self._answered(transaction, text))
            if not reply:
                self._answered(transaction, "")

    def _answered(self, transaction: Transaction, text: str) -> None:
        with self.server._changed:
            transaction.replies.append(text)
            transaction.accepted |= text.startswith("2")
            self.server._changed.notify_all()

    async def _ask(self, challenge: str) -> str:
        await self._send(wire(challenge))
        return await self._line()

    async def _do(self, reaction: Reaction, normal: str = "", before_reply: Callable[[str], None] | None = None) -> str:
        """Do what the script says, or the normal thing; return the (first) reply that was sent, as text."""
        reply = ""
        for step in reaction if isinstance(reaction, tuple) else (reaction,):
            act = normal if step is None else step
            if not isinstance(act, str | bytes | Trickle):
                await self._act(act)
                continue
            text, pause = (act.text, act.seconds) if isinstance(act, Trickle) else (act, 0.0)
            if text and not reply:
                reply = wire(text).decode("utf-8", "surrogateescape").rstrip("\r\n")
                if before_reply is not None:
                    before_reply(reply)
            await self._send(wire(text) if text else b"", pause)
        return reply

    async def _act(self, act: object) -> None:
        match act:
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await act.pass_through()
            case Close():
                raise _Gone("script")
            case HalfClose():
                self.writer.write_eof()
                while await self.reader.read(65536):
                    pass
                raise _Gone("script")
            case Reset():
                self._reset()
                raise _Gone("script")
            case Silence():
                await asyncio.Event().wait()
            case _:
                raise TypeError(f"no reaction: {act!r}")

    def _reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def _send(self, data: bytes, pause: float = 0) -> None:
        self.record.sent += data
        for piece in (data[i : i + 1] for i in range(len(data))) if pause else (data,):
            self.writer.write(piece)
            await self.writer.drain()
            if pause:
                await asyncio.sleep(pause)

    async def _read(self) -> None:
        data = await self.reader.read(65536)
        if not data:
            raise _Gone("eof")
        self.record.received += data
        self.buffer += data

    async def _line(self) -> str:
        while (end := self.buffer.find(b"\n")) < 0:
            await self._read()
        line = bytes(self.buffer[: end + 1])
        del self.buffer[: end + 1]
        self.record.bare_line_ends |= not line.endswith(b"\r\n")
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _called(reaction: Reaction, moment: Moment) -> Reaction:
    return reaction(moment) if callable(reaction) else reaction


def _path(line: str) -> tuple[str, tuple[str, ...]]:
    """Take ``MAIL FROM:<a@b> SIZE=1`` apart: the address, and the parameters."""
    rest = line.partition(":")[2].lstrip()
    if not rest.startswith("<"):
        address, _, parameters = rest.partition(" ")
        return address, tuple(parameters.split())
    # A quoted local part may hold ">" and spaces.
    found = re.match(r'<((?:"(?:\\.|[^"\\])*"|[^">])*)>(.*)', rest, re.DOTALL)
    return (found[1], tuple(found[2].split())) if found else (rest, ())
