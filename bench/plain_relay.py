"""The plainest relay with a copy that Python offers: aiosmtpd in front, aiosmtplib behind, nothing is durable.

The primary's answer to the whole message is the client's; the copy is sent by a task, and lost with the process or
when the backup refuses. With ``--keep`` connections to both are kept open, else each message has its own.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import aiosmtplib
from aiosmtpd.smtp import SMTP

_AT_ONCE = 20  # connections to one target


class Target:
    """One server behind the relay."""

    def __init__(self, port: int, *, keep: bool) -> None:
        self._port = port
        self._keep = keep
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._idle: list[aiosmtplib.SMTP] = []

    async def send(self, envelope: Any) -> str:
        async with self._slots:
            client = self._idle.pop() if self._idle else aiosmtplib.SMTP(hostname="127.0.0.1", port=self._port)
            if not client.is_connected:
                await client.connect()
            _, reply = await client.sendmail(envelope.mail_from, envelope.rcpt_tos, envelope.original_content)
            if self._keep:
                self._idle.append(client)
            else:
                await client.quit()
            return reply


class Handler:
    """What aiosmtpd calls."""

    def __init__(self, primary: Target, backup: Target) -> None:
        self._primary = primary
        self._backup = backup
        self._copies: set[asyncio.Task[str]] = set()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: ARG002, N802, RUF100 - aiosmtpd's
        try:
            reply = await self._primary.send(envelope)
        except (aiosmtplib.SMTPException, OSError) as error:
            return f"451 4.3.0 {type(error).__name__}"
        copy = asyncio.create_task(self._backup.send(envelope))
        self._copies.add(copy)
        copy.add_done_callback(self._copies.discard)
        return f"250 {reply}"


async def serve(port: int, primary: int, backup: int, *, keep: bool) -> None:
    loop = asyncio.get_running_loop()
    handler = Handler(Target(primary, keep=keep), Target(backup, keep=keep))
    server = await loop.create_server(
        lambda: SMTP(handler, hostname="localhost", loop=loop, data_size_limit=None), "127.0.0.1", port, backlog=1000
    )
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ports", type=int, nargs=3, metavar="PORT", help="ours, the primary's, the backup's")
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    asyncio.run(serve(*given.ports, keep=given.keep))


if __name__ == "__main__":
    main()
