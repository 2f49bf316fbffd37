"""The PROXY protocol of load balancers, versions 1 and 2: the first octets of a connection name the client.

aiosmtpd parses the header; here it becomes an address. A connection that does not begin with a complete and valid
header raises BadHeader, and the caller closes it without a reply.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from typing import NamedTuple

from aiosmtpd.proxy_protocol import AF, V2_CMD, AsyncReader, get_proxy

from relay.mail.addresses import plain_address

# aiosmtpd would log what the peer sent, unescaped; the relay logs the failure itself.
logging.getLogger("mail.debug").addHandler(logging.NullHandler())
logging.getLogger("mail.debug").propagate = False


class BadHeader(ValueError):
    """There is no PROXY header, or it is invalid."""


class Origin(NamedTuple):
    """The client's address and port as given by the proxy."""

    address: str
    port: int


async def read_header(reader: AsyncReader) -> Origin | None:
    """Read the header; returns None for the proxy's own connections (health checks). Raises BadHeader."""
    try:
        header = await get_proxy(reader)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise BadHeader("no PROXY header") from error
    if not header.valid:
        raise BadHeader(header.error or "no PROXY header")
    if header.command == V2_CMD.LOCAL or header.family not in (AF.INET, AF.INET6):
        return None
    if not isinstance(header.src_addr, ipaddress.IPv4Address | ipaddress.IPv6Address):
        raise BadHeader("no address in the PROXY header")
    return Origin(plain_address(header.src_addr), header.src_port or 0)
