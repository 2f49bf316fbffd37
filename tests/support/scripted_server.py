"""A real SMTP (or LMTP) server on loopback that does what a test's script says, and records all it is told.

It runs an event loop in a thread of its own, so that it serves tests with and without a loop alike. An error
in the server itself is raised by ``stop``: no test passes on a broken server.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, Self, TypeVar

from relay.mail.destination import Destination
from support import ended_loops
from support.reactions import Moment, Reaction
from support.recorded_sessions import Connection, Transaction
from support.scripted_connection import Conversation
from support.waiting import PATIENCE, REST

T = TypeVar("T")

EXTENSIONS = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")


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
        host: str = "127.0.0.1",
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
        self.host = host
        self.port = port
        self.connections: list[Connection] = []
        self.errors: list[BaseException] = []
        self._turns: dict[str, tuple[list[Any], int]] = {}
        self.changed = threading.Condition()
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
            self._call(ended_loops.end_all())
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
            self._call(ended_loops.close(self._server))
            self._server = None

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
        with self.changed:
            return [t for connection in self.connections for t in connection.transactions]

    @property
    def messages(self) -> list[Transaction]:
        """The transactions that were accepted, in no promised order."""
        return [t for t in self.transactions if t.accepted]

    @property
    def commands(self) -> list[str]:
        with self.changed:
            return [command for connection in self.connections for command in connection.commands]

    @property
    def open_connections(self) -> int:
        with self.changed:
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
        while True:
            with self.changed:
                looked = time.monotonic()
                if result := predicate():
                    return result
                cost = time.monotonic() - looked
                if not self.changed.wait(deadline - time.monotonic()):
                    text = message() if callable(message) else message
                    raise AssertionError(f"not within {timeout:g} s: {text or predicate}; commands: {self.commands}")
            time.sleep(cost * REST)  # what takes long, with hundreds of messages, is not looked at after each command

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
        with self.changed:
            connection = Connection(len(self.connections), tls=self.implicit_tls)
            self.connections.append(connection)
            self.changed.notify_all()
        ended = "stopped"
        try:
            ended = await Conversation(self, connection, reader, writer).run()
        except asyncio.CancelledError:
            pass  # our own end is no error
        except (OSError, ssl.SSLError):
            ended = "eof"
        except Exception as error:  # shown by stop()
            self.errors.append(error)
        finally:
            self._tasks.discard(task)
            writer.close()
            with self.changed:
                connection.closed = ended
                self.changed.notify_all()

    def reaction(self, key: str, line: str, connection: Connection) -> Reaction:
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
                return found

    def key_for(self, line: str) -> str:
        upper = line.upper()
        keys = (k for k in list(self.replies) if k not in {".", "CONNECT"} and upper.startswith(k.upper()))
        return max(keys, key=len, default="")
