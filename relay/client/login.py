"""AUTH at a server: CRAM-MD5, PLAIN and LOGIN (RFC 4954, RFC 2195, RFC 4616), by what the server offers.

Nothing here decides whether a password may be sent; see connect.py. A refused method is followed by the next one, since
some servers offer what they do not support.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode

from relay.client.connection import Connection
from relay.client.errors import ConnectFailed
from relay.mail.reply import Reply

_METHODS = ("CRAM-MD5", "PLAIN", "LOGIN")  # the first one that a server offers is tried first
_TAKEN, _GO_ON = 235, 334


async def log_in(connection: Connection, user: str, password: str, timeout: float) -> Reply | None:
    """Log in; returns None, or the reply that refuses. Raises ClientError, also when no method is known."""
    offered = connection.extensions.get("AUTH", "").upper().split()
    refusal: Reply | None = None
    for method in _METHODS:
        if method in offered:
            refusal = await _try(connection, method, user.encode(), password.encode(), timeout)
            if refusal is None:
                return None
    if refusal is None:
        raise ConnectFailed("the server offers no AUTH that we know", stage="AUTH")
    return refusal


async def _try(connection: Connection, method: str, user: bytes, password: bytes, timeout: float) -> Reply | None:
    if method == "PLAIN":
        first = b" " + b64encode(b"\0%s\0%s" % (user, password))
    else:
        first = b" " + b64encode(user) if method == "LOGIN" else b""
    reply = await connection.command(b"AUTH " + method.encode() + first, timeout=timeout)
    if reply.code == _GO_ON and method != "PLAIN":
        answer = b64encode(password) if method == "LOGIN" else _response(reply.lines[0], user, password)
        reply = await connection.command(answer, timeout=timeout)
    return None if reply.code == _TAKEN else reply


def _response(challenge: str, user: bytes, password: bytes) -> bytes:
    """Return the response to a challenge of CRAM-MD5; "*" gives up where the challenge is none (RFC 4954 4)."""
    try:
        digest = hmac.new(password, b64decode(challenge), "md5")
    except ValueError:
        return b"*"
    return b64encode(user + b" " + digest.hexdigest().encode())
