"""How a command talks to a running smtp-dup: a Unix socket in the state folder, one JSON object a line.

Whoever may write to the socket, the service's user and root, may ask. The supervisor never waits for who asks: a
question is short, an answer goes out as far as the kernel takes it, and one that is silent for long is hung up on when
others come. A socket where nobody listens is what a dead one has left.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from relay import maillog, unix_sockets
from relay.mail.stored import parsed_object

ROLES = ("up", "relay", "workers")
_QUESTION = 4096  # octets
_AT_ONCE = 16
PATIENCE = 5.0  # seconds for a supervisor that is busy to say its first word
_SEND_SECONDS = 0.2  # an answer is small enough for the kernel; who reads none of it is not waited for

Tell = Callable[[dict[str, Any]], None]  # sends an object to who has asked
Question = dict[str, Any]


class Control:
    """The supervisor's end. ``watch`` and ``forget`` are its own; ``answer`` gets each question and how to answer it.

    What ``answer`` gets may be called later, and more than once; who has gone is told nothing.
    """

    def __init__(
        self,
        state_dir: Path,
        role: str,
        watch: Callable[[int, Callable[[], None]], None],
        forget: Callable[[int], None],
        answer: Callable[[Question, Tell], None],
    ) -> None:
        self._state_dir = state_dir.absolute()
        self._name = f"{role}.sock"
        self._watch, self._forget, self._answer = watch, forget, answer
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []  # the oldest first

    def open(self) -> None:
        """Listen; where that cannot be done it is told, and commands have to do without."""
        try:
            # What has the name is of a dead one: the role's lock is ours.
            listener = unix_sockets.listening(self._state_dir, self._name, _AT_ONCE)
        except OSError as error:
            text = "commands cannot talk to this process: reload by SIGHUP"
            maillog.notice("warning", text, socket=str(self._state_dir / self._name), reason=str(error))
            return
        self._listener = listener
        self._watch(listener.fileno(), self._accept)

    def close(self) -> None:
        """Listen no more."""
        for sock in [*self._open, *([self._listener] if self._listener else [])]:
            self._hang_up(sock)
        if self._listener:
            self._listener = None
            with contextlib.suppress(OSError):
                (self._state_dir / self._name).unlink()

    def _accept(self) -> None:
        if self._listener is None:
            return
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            client.setblocking(False)
            if len(self._open) >= _AT_ONCE:
                self._hang_up(self._open[0])
            self._open.append(client)
            received = bytearray()
            self._watch(client.fileno(), lambda: self._read(client, received))

    def _read(self, client: socket.socket, received: bytearray) -> None:
        try:
            octets = client.recv(_QUESTION)
        except BlockingIOError:
            return
        except OSError:
            octets = b""
        received += octets
        line, newline, rest = bytes(received).partition(b"\n")
        if not octets or len(received) > _QUESTION:
            self._hang_up(client)
        elif newline:
            received[:] = rest
            if (question := parsed_object(line)) is not None:
                self._answer(question, lambda told: self._send(client, told))
            else:
                self._hang_up(client)

    def _send(self, client: socket.socket, told: dict[str, Any]) -> None:
        if client in self._open:
            try:
                client.setblocking(True)
                client.settimeout(_SEND_SECONDS)
                client.sendall(json.dumps(told).encode() + b"\n")
                client.setblocking(False)
            except OSError:
                self._hang_up(client)

    def _hang_up(self, sock: socket.socket) -> None:
        if sock in self._open:
            self._open.remove(sock)
        if sock.fileno() >= 0:
            self._forget(sock.fileno())
            sock.close()


# The command's end ----------------------------------------------------------------------------------------------


class Silent(Exception):
    """A running smtp-dup that does not answer in time, or has gone in the middle."""


class Line:
    """A connection to a running smtp-dup."""

    def __init__(self, role: str, sock: socket.socket) -> None:
        self.role = role
        self._sock = sock
        self._received = b""

    def ask(self, question: Question) -> None:
        """Ask. Raises Silent."""
        try:
            self._sock.settimeout(PATIENCE)
            self._sock.sendall(json.dumps(question).encode() + b"\n")
        except OSError as error:
            raise Silent(str(error)) from error

    def hear(self, seconds: float = PATIENCE) -> dict[str, Any] | None:
        """Return what it says next, None when the time is over. Raises Silent."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            self._sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                octets = self._sock.recv(65536)
            except TimeoutError:
                return None
            except OSError as error:
                raise Silent(str(error)) from error
            if not octets:
                raise Silent("it has ended")
            self._received += octets
        line, _, self._received = self._received.partition(b"\n")
        if (told := parsed_object(line)) is None:
            raise Silent("what it says makes no sense")
        return told

    def close(self) -> None:
        """Hang up."""
        self._sock.close()


@contextlib.contextmanager
def lines(state_dir: Path) -> Iterator[list[Line]]:
    """Connect to each smtp-dup that runs with this state folder: `up`, or `relay` and `workers`. Raises OSError."""
    found: list[Line] = []
    try:
        found += [Line(role, sock) for role in ROLES if (sock := _connect(state_dir, role))]
        yield found
    finally:
        for line in found:
            line.close()


def is_running(state_dir: Path, role: str) -> bool:
    """Say whether one listens, without a question to it."""
    try:
        sock = _connect(state_dir, role)
    except OSError:
        return False
    if sock is None:
        return False
    sock.close()
    return True


def _connect(state_dir: Path, role: str) -> socket.socket | None:
    return unix_sockets.connected(state_dir.absolute(), f"{role}.sock", patience=PATIENCE)
