"""An SMTP server that greylists: a recipient that it has not seen for so many seconds is answered 450 at RCPT.

It answers each line ``COUNTS`` (no SMTP command) with what it has counted: accepted, deferred, distinct recipients.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from typing import cast

import uvloop


@dataclass(slots=True)
class State:
    """What all connections share."""

    seconds: float
    seen: dict[bytes, float] = field(default_factory=dict)
    accepted: dict[bytes, int] = field(default_factory=dict)
    deferred: int = 0


class Session(asyncio.Protocol):
    """One connection; a client that pipelines is answered in order, in one packet."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._buffer = b""
        self._recipients: list[bytes] = []
        self._in_data = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no class of asyncio's
        self._transport.write(b"220 grey.example ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        answers = []
        while True:
            if self._in_data:
                # The line before a lone dot ends with CRLF, or is the DATA line itself.
                end = 0 if self._buffer.startswith(b".\r\n") else self._buffer.find(b"\r\n.\r\n")
                if end < 0:
                    break
                self._buffer = self._buffer[end + (3 if not end else 5) :]
                self._in_data = False
                for recipient in self._recipients:
                    self._state.accepted[recipient] = self._state.accepted.get(recipient, 0) + 1
                answers.append(b"250 2.0.0 queued\r\n" if self._recipients else b"554 5.5.1 nobody\r\n")
                self._recipients = []
                continue
            line, end_of_line, rest = self._buffer.partition(b"\r\n")
            if not end_of_line:
                break
            self._buffer = rest
            answers.append(self._command(line))
        if answers:
            self._transport.write(b"".join(answers))
        if answers and answers[-1].startswith(b"221"):
            self._transport.close()

    def _command(self, line: bytes) -> bytes:
        verb = line[:4].upper()
        if verb == b"EHLO":
            return b"250-grey.example\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 ENHANCEDSTATUSCODES\r\n"
        if verb == b"RCPT":
            return self._rcpt(line[line.find(b"<") + 1 : line.find(b">")])
        if verb == b"DATA":
            if not self._recipients:
                return b"554 5.5.1 no valid recipients\r\n"
            self._in_data = True
            return b"354 go ahead\r\n"
        if verb in {b"MAIL", b"RSET"}:
            self._recipients = []
        if line == b"COUNTS":
            state = self._state
            return b"250 %d %d %d\r\n" % (sum(state.accepted.values()), state.deferred, len(state.accepted))
        return b"221 2.0.0 bye\r\n" if verb == b"QUIT" else b"250 2.0.0 ok\r\n"

    def _rcpt(self, address: bytes) -> bytes:
        now = time.monotonic()
        if now - self._state.seen.setdefault(address, now) < self._state.seconds or now == self._state.seen[address]:
            self._state.deferred += 1
            return b"450 4.2.0 greylisted, try again later\r\n"
        self._recipients.append(address)
        return b"250 2.1.5 ok\r\n"


async def serve(port: int, seconds: float) -> None:
    state = State(seconds)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Session(state), "127.0.0.1", port, backlog=1000)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("seconds", type=float, help="from the first try of a recipient until it is accepted")
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.seconds))


if __name__ == "__main__":
    main()
