"""The identity of the client that a message comes from, as (name, value) pairs with XFORWARD's attribute names."""

from __future__ import annotations

from relay.mail.addresses import is_loopback
from relay.mail.envelope import Envelope

Identity = tuple[tuple[str, str], ...]


def of_client(address: str, port: int, helo: str, *, extended: bool) -> Identity:
    """Return the identity of a connected client; () for a local one, whose address identifies nobody."""
    if not address or is_loopback(address):
        return ()
    known = [("ADDR", address), ("PORT", str(port) if port else ""), ("PROTO", "ESMTP" if extended else "SMTP")]
    return tuple((name, value) for name, value in (*known, ("HELO", helo), ("SOURCE", "REMOTE")) if value)


def of_envelope(envelope: Envelope) -> Identity:
    """Return the identity of a message's client, for a backup."""
    return envelope.identity or of_client(envelope.client_address, 0, envelope.client_helo, extended=True)
