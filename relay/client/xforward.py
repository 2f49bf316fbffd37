"""Sends the identity of the original client to a server: XFORWARD (for its log), XCLIENT (for its access rules).

Nothing is sent to a server that does not offer them. If the identity on a connection cannot be changed, ``introduce``
raises NotIntroduced, and the caller needs a new connection.
"""

from __future__ import annotations

from collections.abc import Mapping

from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.mail.addresses import is_loopback
from relay.mail.origin import Identity
from relay.mail.reply import Reply

_NOT_TAKEN = (500, 501, 502, 503, 504, 550)  # of XCLIENT itself; other refusals are of the client that it names
_LINE = 510  # octets of a command without CRLF


class NotIntroduced(ClientError):
    """The connection carries the identity of another client, and it cannot be changed."""


def xforward(identity: Identity, connection: Connection) -> list[bytes]:
    """Return the XFORWARD commands for this server, [] if it does not offer them. They hold for one transaction."""
    return [] if connection.introduced or not identity else _commands("XFORWARD", identity, connection.extensions)


def _commands(verb: str, identity: Identity, extensions: Mapping[str, str]) -> list[bytes]:
    offered = extensions.get(verb, "").upper().split()
    lines: list[str] = []
    for name, value in identity:
        if name not in offered:
            continue
        text = f"IPv6:{value}" if name == "ADDR" and ":" in value else value
        word = f"{name}={_encoded(text)}"
        if lines and len(lines[-1]) + 1 + len(word) <= _LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f"{verb} {word}")
    return [line.encode("ascii") for line in lines]


def _encoded(value: str) -> str:
    octets = value.encode("utf-8", "surrogateescape")
    return "".join(chr(o) if 32 < o < 127 and o not in b"+=" else f"+{o:02X}" for o in octets)


def is_introduced(connection: Connection, identity: Identity) -> bool:
    """Return whether ``introduce`` would send nothing."""
    return _introduction(connection, identity) == connection.introduced


def _introduction(connection: Connection, identity: Identity) -> bytes:
    """Return the XCLIENT command for this server, b"" if it does not offer it.

    Never with a loopback address: the server would trust the client as a local program.
    """
    address = dict(identity).get("ADDR", "")
    if not address or is_loopback(address) or connection.destination.username:
        return b""
    return next(iter(_commands("XCLIENT", identity, connection.extensions)), b"")


async def introduce(connection: Connection, identity: Identity, *, timeout: float) -> Reply | None:
    """Send XCLIENT and a new EHLO to a server that offers it, if the identity on the connection changes.

    Returns None, or the reply with which the server refuses this client. Raises ClientError, NotIntroduced.
    """
    wanted = _introduction(connection, identity)
    if wanted == connection.introduced:
        return None
    if not wanted:
        raise NotIntroduced("the connection was another client's", stage="XCLIENT")
    reply = await connection.command(wanted, timeout=timeout)
    if not reply.is_positive:
        if connection.introduced or reply.code == 421:
            raise NotIntroduced("XCLIENT was refused", stage="XCLIENT", reply=reply)
        return None if reply.code in _NOT_TAKEN else reply
    connection.introduced = wanted
    hello = b"LHLO " if connection.destination.scheme == "lmtp" else b"EHLO "
    reply = await connection.command(hello + connection.hostname.encode("ascii", "replace"), timeout=timeout)
    if not reply.is_positive:
        raise NotIntroduced("EHLO after XCLIENT was refused", stage="XCLIENT", reply=reply)
    connection.announce(reply.lines[1:])
    return None
