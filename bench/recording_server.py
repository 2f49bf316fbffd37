"""A fast SMTP server that notes the number of each message that it takes, and misbehaves as it is told.

For mail of bench/numbered.py: the number is in the recipients, ``n<number>.<index>@``. Before it says 250 it appends
``<ms> <number> <mask of recipients> <smtp-dup's id> <digest> <recipients>`` to its file, with ``corrupt`` in front when
the body is not what its checksum says. The digest is of sender, parameters and all that came below the first
``Received:``. With ``--refuses`` it refuses for good whom and what bench/numbered.py says. Each line on standard input
is a mood (see ``MOODS``); the process is stopped by its id.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import socket
import struct
import sys
import time
import zlib
from dataclasses import dataclass, field
from typing import cast

import uvloop

from bench import numbered

MOODS = ("well", "down", "tempfail", "greylist", "busy", "reset", "slow")

_RECIPIENT = re.compile(rb"n(\d+)\.(\d+)@")
_PATH = re.compile(rb"[^<]*<([^>]*)> ?(.*)$")
_RECEIVED = re.compile(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*")
_KEPT = (b"BODY=", b"SMTPUTF8")  # the parameters that are of the message, not of the conversation
_ID = re.compile(rb"\(smtp-dup\) with \w+ id (\w+);")
_CHECKSUM = b"\r\nX-Checksum: "
_EXTENSIONS = (
    b"250-recording.example\r\n250-PIPELINING\r\n250-SIZE 100000000\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n"
    b"250 ENHANCEDSTATUSCODES\r\n"
)
_CHANCE = 0.15  # of a fault, at each step that can have one
_RST = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Envelope:
    """What a transaction has said so far."""

    sender: bytes = b""
    parameters: list[bytes] = field(default_factory=list)
    recipients: list[bytes] = field(default_factory=list)
    number: int = -1
    mask: int = 0


@dataclass(slots=True)
class State:
    """What all connections share."""

    file: int
    port: int
    source: random.Random
    refuses: bool = False
    mood: str = "well"
    seen: set[bytes] = field(default_factory=set)
    sessions: set[Session] = field(default_factory=set)
    server: asyncio.Server | None = None

    def unlucky(self, mood: str) -> bool:
        return self.mood == mood and self.source.random() < _CHANCE

    def record(self, envelope: Envelope, body: bytes) -> bytes:
        """Note a message; returns its id."""
        trace = _RECEIVED.match(body)
        below = body[trace.end() :] if trace else body
        told = numbered.digest(envelope.sender, envelope.parameters, below).encode()
        found = _ID.search(body[:1000])
        name = found[1] if found else b"-"
        start = body.find(_CHECKSUM)
        wanted = body[start + len(_CHECKSUM) : start + len(_CHECKSUM) + 8]
        text = body[start + len(_CHECKSUM) + 8 + 4 :]
        good = start >= 0 and wanted == b"%08x" % zlib.crc32(text)
        words = (b"%d" % (time.time() * 1000), b"%d" % envelope.number, b"%d" % envelope.mask, name, told)
        line = b" ".join((*words, b",".join(envelope.recipients))) + b"\n"
        os.write(self.file, line if good and envelope.number >= 0 else b"corrupt " + line)
        return name


class Session(asyncio.Protocol):
    """One connection; a client that pipelines is answered in order."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._buffer = bytearray()
        self._looked = 0  # how far the body was searched
        self._in_data = False
        self._waiting = False  # a slow answer is on its way; nothing is read before it
        self._envelope = Envelope()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._state.sessions.add(self)
        if self._state.mood == "busy":
            self._say(b"421 4.3.2 busy\r\n", end=True)
        else:
            self._say(b"220 recording.example ESMTP\r\n")

    def connection_lost(self, _error: Exception | None) -> None:
        self._state.sessions.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._go_on()

    def reset(self) -> None:
        """End the connection with a RST."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
        self._transport.abort()

    def _say(self, answer: bytes, *, end: bool = False) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)
            if end:
                self._transport.close()

    def _go_on(self) -> None:
        while not self._waiting and not self._transport.is_closing():
            if self._in_data:
                if not self._body():
                    return
                continue
            end = self._buffer.find(b"\n")
            if end < 0:
                return
            line = bytes(self._buffer[:end]).rstrip()
            del self._buffer[: end + 1]
            self._command(line)

    def _command(self, line: bytes) -> None:
        state = self._state
        verb = line[:4].upper()
        if state.mood == "busy":
            self._say(b"421 4.3.2 busy\r\n", end=True)
        elif state.unlucky("reset"):
            self.reset()
        elif verb == b"EHLO":
            self._say(_EXTENSIONS)
        elif verb == b"RCPT":
            self._rcpt(line)
        elif verb == b"DATA":
            if self._envelope.recipients:
                self._in_data, self._looked = True, 0
                self._say(b"354 go ahead\r\n")
            else:
                self._say(b"554 5.5.1 no valid recipients\r\n")
        elif verb == b"QUIT":
            self._say(b"221 2.0.0 bye\r\n", end=True)
        elif verb == b"MAIL":
            self._mail(line)
        else:
            if verb == b"RSET":
                self._envelope = Envelope()
            self._say(b"250 2.0.0 ok\r\n")

    def _mail(self, line: bytes) -> None:
        self._envelope = Envelope()
        if found := _PATH.match(line):
            self._envelope.sender = found[1]
            self._envelope.parameters = [w for w in found[2].upper().split() if w.startswith(_KEPT)]
        if self._state.unlucky("tempfail"):
            self._say(b"451 4.3.0 not now\r\n")
        else:
            self._say(b"250 2.0.0 ok\r\n")

    def _rcpt(self, line: bytes) -> None:
        state, envelope = self._state, self._envelope
        path = _PATH.match(line)
        address = path[1] if path else line[8:]
        found = _RECIPIENT.match(address)
        if state.refuses and found and numbered.refuses_recipient(int(found[1]), int(found[2])):
            self._say(b"550 5.1.1 %s is unknown here\r\n" % address)
        elif state.unlucky("tempfail") or (state.mood == "greylist" and address not in state.seen):
            state.seen.add(address)
            self._say(b"451 4.7.1 try again\r\n")
        else:
            if found:  # another address is noted as it came, and for the audit to see
                envelope.number = int(found[1])
                envelope.mask |= 1 << int(found[2])
            envelope.recipients.append(address)
            self._say(b"250 2.1.5 ok\r\n")

    def _body(self) -> bool:
        """Take the body when all of it is there; False when it is not."""
        end = self._buffer.find(b"\r\n.\r\n", max(0, self._looked - 4))
        if end < 0:
            self._looked = len(self._buffer)
            if len(self._buffer) > 1000 and self._state.unlucky("reset"):
                self.reset()
            return False
        body = bytes(self._buffer[: end + 2])
        del self._buffer[: end + 5]
        self._in_data = False
        state = self._state
        if state.unlucky("reset"):
            self.reset()
            return True
        if state.unlucky("tempfail"):
            self._say(b"451 4.3.0 not this one\r\n")
            return True
        if state.refuses and numbered.refuses_message(self._envelope.number):
            self._say(b"554 5.7.1 message %d is refused\r\n" % self._envelope.number)
            return True
        name = state.record(self._envelope, body)
        self._envelope = Envelope()
        if state.unlucky("reset"):  # taken, and nobody hears of it
            self.reset()
        elif state.mood == "slow":
            self._waiting = True
            asyncio.get_running_loop().call_later(state.source.random(), self._late, name)
        else:
            self._say(b"250 2.0.0 taken as %s\r\n" % name)
        return True

    def _late(self, name: bytes) -> None:
        self._waiting = False
        self._say(b"250 2.0.0 taken as %s\r\n" % name)
        self._go_on()


async def _listen(state: State) -> None:
    loop = asyncio.get_running_loop()
    sock = _bound(state.port)
    sock.listen(1000)
    state.server = await loop.create_server(lambda: Session(state), sock=sock, backlog=1000)


async def _turn(state: State, mood: str) -> None:
    if mood not in MOODS:
        raise ValueError(mood)
    state.mood = mood
    if mood == "down":
        if state.server is not None:
            state.server.close()
            state.server = None
        for session in list(state.sessions):
            session.reset()
    elif state.server is None:
        await _listen(state)


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.setblocking(False)
    return sock


async def serve(port: int, path: str, seed: int, *, refuses: bool) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    state = State(file, port, random.Random(seed), refuses)
    keeper = _bound(port)  # never listens: the port stays ours while we are down
    await _listen(state)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await _turn(state, line.decode().strip())
    keeper.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("file", help="where to note what was taken")
    parser.add_argument("seed", type=int)
    parser.add_argument("--refuses", action="store_true", help="some recipients and messages for good")
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.file, given.seed, refuses=given.refuses))


if __name__ == "__main__":
    main()
