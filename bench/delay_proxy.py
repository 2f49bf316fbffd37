"""A TCP proxy that is far away: an octet takes half of the round trip in either direction, a greeting two of them."""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from typing import cast

import uvloop


class Side(asyncio.Protocol):
    """One end of a connection. What it reads is written to the other end after the delay, in order."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[bytes] = deque()
        self.transport: asyncio.Transport | None = None
        self.other: Side | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's are of no class of asyncio's

    def data_received(self, data: bytes) -> None:
        self._later(data)

    def eof_received(self) -> bool:
        self._later(b"")
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._later(b"")

    def _later(self, data: bytes) -> None:
        self._waiting.append(data)
        self._loop.call_later(self._delay, self._deliver)

    def _deliver(self) -> None:
        data = self._waiting.popleft()
        transport = self.other.transport if self.other else None
        if transport is None or transport.is_closing():
            return
        if data:
            transport.write(data)
        else:
            transport.close()


class Near(Side):
    """The client's end: it connects to the server when that would have heard of the client."""

    def __init__(self, delay: float, port: int) -> None:
        super().__init__(delay)
        self._port = port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._task = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        # The kernel has answered the SYN at once: that round trip, and the way of the ACK, are made up for here.
        await asyncio.sleep(3 * self._delay)
        far = Side(self._delay)
        far.other, self.other = self, far
        try:
            await self._loop.create_connection(lambda: far, "127.0.0.1", self._port)
        except OSError:
            assert self.transport is not None
            self.transport.abort()


async def serve(port: int, target: int, milliseconds: float) -> None:
    loop = asyncio.get_running_loop()
    delay = milliseconds / 2000
    server = await loop.create_server(lambda: Near(delay, target), "127.0.0.1", port, backlog=1000)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("target", type=int)
    parser.add_argument("milliseconds", type=float, help="of a round trip")
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.target, given.milliseconds))


if __name__ == "__main__":
    main()
