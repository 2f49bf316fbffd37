"""The private attributes of redis-py's connections that we use, all in this one module.

redis-py has no public way to bypass its stream and parser, nor to its socket. Written for redis-py 5.2 to 8.1 (bounded
in pyproject.toml); before a later version is allowed, tests/redisio/test_raw_connection.py must pass with it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import ConnectionError as NoConnection


def transport(connection: Any) -> asyncio.Transport:
    """Return the transport of a connection; whoever replaces its protocol must restore it.

    Raises redis-py's ConnectionError if it is closed, as it may be at any time: uvloop would raise a RuntimeError at a
    write.
    """
    if (found := _open_transport(connection)) is None:
        raise NoConnection("Redis closed the connection")
    return found


def _open_transport(connection: Any) -> asyncio.Transport | None:
    writer = connection._writer  # noqa: SLF001 - see above
    return None if writer is None or writer.transport.is_closing() else writer.transport


def error_parser(connection: Any) -> Callable[[str], Exception]:
    """Return the function that turns the text of an error reply into redis-py's exception."""
    found: Callable[[str], Exception] = connection._parser.parse_error  # noqa: SLF001 - see above
    return found


async def living(pool: Any) -> Any:
    """Return a connection from a pool, but not one that Redis closed while it was idle.

    With RESP3 the pool would return such a connection, and its transport, which has seen the end of input already,
    would never report it to a new protocol.
    """
    connection = await pool.get_connection()
    try:
        if await connection.can_read() or _open_transport(connection) is None:
            await connection.disconnect(nowait=True)
            await connection.connect()
    except BaseException:
        await discard(pool, connection)
        raise
    return connection


async def discard(pool: Any, connection: Any) -> None:
    """Close a connection and give it back to the pool, which limits their number."""
    try:
        await connection.disconnect(nowait=True)
    finally:
        await pool.release(connection)


def end_sending(connection: Any) -> None:
    """Close the sending half of a synchronous connection, below any TLS; whoever waits for its reply goes on reading.

    Another thread may close it meanwhile: then it does nothing.
    """
    sock = connection._sock  # noqa: SLF001 - see above
    with suppress(OSError, ValueError):
        if sock is not None:
            with socket.socket(fileno=os.dup(sock.fileno())) as twin:
                twin.shutdown(socket.SHUT_WR)
