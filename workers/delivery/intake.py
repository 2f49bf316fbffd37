"""The worker's side of the hand-over: takes copies from the relay processes of this host, within limits that it sets.

It listens on a socket of its own in the state folder, and tells each relay how much it takes. What comes is gathered
for a turn of the loop. What it is sent it reads before any job claims copies (``read_now``): a copy is handed over
before its job is made, so the job finds it in hand.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from relay import faultpoints, maillog, private_files, unix_sockets
from relay.handover.frames import BadFrame, HandedCopy, Hello, Limits, folder_of, read_copies

_BACKLOG = 64
_LOOK_SECONDS = 0.25
_MISSING_SECONDS = 2.0  # between two looks whether its socket still has its name
_PAUSE = 0.005  # seconds between two reads while copies come
_AT_ONCE = 256 << 10  # octets of one read
_PART = 4  # a limit is told again when it has changed by this part of the room
_NAMED = 32  # letters of the destination in the name of its socket, which the system bounds
_numbers = itertools.count(1)

Room = Callable[[], tuple[int, int]]  # how many copies, and octets of them, may come now


class Intake:
    """The socket of one courier and its connections."""

    def __init__(
        self,
        state_dir: Path,
        hello: Hello,
        room: Room,
        take: Callable[[list[HandedCopy]], None],
        on_gone: Callable[[], None],
    ) -> None:
        """``take`` gets what has come in a turn; ``on_gone`` is called when a relay has gone, or was hung up on."""
        self._folder = folder_of(state_dir)
        self._hello = hello
        self._room, self._take, self._on_gone = room, take, on_gone
        self._name = f"{hello.destination[:_NAMED]}.{os.getpid()}.{next(_numbers)}.sock"
        self._listener: socket.socket | None = None
        self._is_stopped = self._has_told = False
        self._connections: list[_Connection] = []
        self._copies: list[HandedCopy] = []

    def open(self) -> None:
        """Listen; where that cannot be done it is told, and every first try is made by a job."""
        loop = asyncio.get_running_loop()
        try:
            private_files.folder(self._folder)
            self._remove_dead()
            # It gets its name once it listens: a name where nobody listens is a dead one's, and removed.
            listener = unix_sockets.listening(self._folder, f".{self._name}.new", _BACKLOG)
            try:
                (self._folder / f".{self._name}.new").rename(self._folder / self._name)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            if not self._has_told:
                text = "relays cannot hand copies to this worker: first tries wait for a job"
                maillog.notice("warning", text, socket=str(self._folder / self._name), reason=str(error))
            self._has_told = True
            return
        self._listener, self._has_told = listener, False
        loop.add_reader(listener, self._accept, loop)

    def stop(self) -> None:
        """Listen no more, and want no more."""
        self._is_stopped = True
        self._close_listener()
        self.tell()

    def close(self) -> None:
        """Hang up; what has come and was not read is for others."""
        self.stop()
        for connection in tuple(self._connections):
            connection.close()

    async def watch(self) -> None:
        """Tell relays when the room has changed, and that what they sent has come; see to it that they find the socket.

        Runs until cancelled.
        """
        look_at = 0.0
        while True:
            self.tell(is_receipt=True)
            if (now := time.monotonic()) >= look_at and not self._is_stopped:
                look_at = now + _MISSING_SECONDS
                if not (self._folder / self._name).is_socket():  # somebody has tidied up there
                    self._close_listener()
                    self.open()
            await asyncio.sleep(_LOOK_SECONDS)

    def tell(self, *, is_receipt: bool = False) -> None:
        """Tell the relays how much may come; with a receipt also where only as much less as has come."""
        if self._connections:
            copies, octets = self._room()
            share = len(self._connections)
            for connection in tuple(self._connections):
                connection.tell(copies // share, octets // share, is_receipt=is_receipt)

    def read_now(self) -> None:
        """Take all that has been handed over until now."""
        for connection in tuple(self._connections):
            connection.read_all()
        self._give()

    def _close_listener(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            with suppress(OSError):
                (self._folder / self._name).unlink()

    def _remove_dead(self) -> None:
        for path in self._folder.glob("*.sock"):
            with suppress(OSError):
                if not private_files.is_socket_of_ours(path.lstat()):
                    continue
                sock = unix_sockets.connected(self._folder, path.name, patience=0)
                if sock is None:
                    path.unlink()
                else:
                    sock.close()

    def _accept(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._listener is None:
            return
        with suppress(OSError):
            sock, _ = self._listener.accept()
            connection = _Connection(sock, loop, self._came, self._gone)
            self._connections.append(connection)
            connection.greet(self._hello)
            self.tell()

    def _came(self, copies: list[HandedCopy]) -> None:
        if not self._copies:
            asyncio.get_running_loop().call_soon(self._give)
        self._copies += copies

    def _give(self) -> None:
        copies, self._copies = self._copies, []
        if copies:
            faultpoints.reach("taken from memory")
            self._take(copies)

    def _gone(self, connection: _Connection) -> None:
        self._connections.remove(connection)
        self._on_gone()


class _Connection:
    """A relay process that may hand over copies."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        came: Callable[[list[HandedCopy]], None],
        gone: Callable[[_Connection], None],
    ) -> None:
        self._sock, self._loop = sock, loop
        self._came, self._gone = came, gone
        self._received = bytearray()
        self._copies = self._octets = 0  # that have come in all
        self._told = Limits(0, 0)
        self._receipted = 0  # copies that the relay knows to have come
        self._is_open = True
        sock.setblocking(False)
        loop.add_reader(sock, self._begin)

    def greet(self, hello: Hello) -> None:
        self._send(hello.packed())

    def tell(self, copies: int, octets: int, *, is_receipt: bool = False) -> None:
        """Say that so much more may come, unless it would change little and nothing that came awaits a receipt."""
        limits = Limits(self._copies + copies, self._octets + octets)
        told = self._told
        changed = abs(limits.copies - told.copies) * _PART > copies or abs(limits.octets - told.octets) * _PART > octets
        if changed or (is_receipt and self._copies != self._receipted):
            self._told, self._receipted = limits, self._copies
            self._send(limits.packed())

    def read_all(self) -> None:
        """Read until there is nothing."""
        while self._is_open and self._read():
            pass

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()
            self._gone(self)

    def _begin(self) -> None:
        """Read what has come, and from time to time while more comes: a wake for each copy costs more than the rest."""
        self._loop.remove_reader(self._sock)
        self._go_on()

    def _go_on(self) -> None:
        if not self._is_open:
            return
        if self._read():
            self._loop.call_later(_PAUSE, self._go_on)
        elif self._is_open:
            self._loop.add_reader(self._sock, self._begin)

    def _read(self) -> bool:
        try:
            octets = self._sock.recv(_AT_ONCE)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            octets = b""
        if not octets:
            self.close()
            return False
        self._received += octets
        copies: list[HandedCopy] = []
        try:
            for copy in read_copies(self._received):
                copies.append(copy)
                self._copies += 1
                self._octets += len(copy.record)
        except BadFrame as error:
            maillog.notice("error", "hand-over from a relay", reason=str(error))
            self.close()
        if copies:
            self._came(copies)
        return True

    def _send(self, octets: bytes) -> None:
        """Send what is small enough for the kernel; a relay that reads nothing is hung up on."""
        try:
            if self._sock.send(octets) == len(octets):
                return
        except OSError:
            pass
        self.close()
