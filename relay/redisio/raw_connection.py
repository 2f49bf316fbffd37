"""What the pipelines use of redis-py's asyncio connections that is not public: the one place that names it.

redis-py has no public way past its stream and parser. Written for redis-py 5.2 to 8.1 (bounded in pyproject.toml); a
later one is let in when tests/redisio/test_raw_connection.py passes with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


def transport(connection: Any) -> asyncio.Transport:
    """Return the transport of a connected connection; its protocol may be replaced, and must be given back."""
    found: asyncio.Transport = connection._writer.transport  # noqa: SLF001
    return found


def error_parser(connection: Any) -> Callable[[str], Exception]:
    """Return what makes an exception of an error reply, so that errors are the same as redis-py's own."""
    found: Callable[[str], Exception] = connection._parser.parse_error  # noqa: SLF001
    return found


async def living(pool: Any) -> Any:
    """Return a connection of a pool that Redis has not closed while it was at rest.

    With RESP3 the pool hands out such a one all the same, and its transport, which has seen the end already, would
    never tell another protocol of it.
    """
    connection = await pool.get_connection()
    try:
        if await connection.can_read() or transport(connection).is_closing():
            await connection.disconnect(nowait=True)
            await connection.connect()
    except BaseException:
        await discard(pool, connection)
        raise
    return connection


async def discard(pool: Any, connection: Any) -> None:
    """Close a connection and give its place back: a pool has so many only."""
    try:
        await connection.disconnect(nowait=True)
    finally:
        await pool.release(connection)
