"""Where a message comes from: the attributes of its client, in XFORWARD's names."""

from __future__ import annotations

from relay.mail.addresses import is_loopback
from relay.mail.envelope import Envelope

Identity = tuple[tuple[str, str], ...]


# What a server is told ----------------------------------------------------------------------------------------


def of_client(address: str, port: int, helo: str, *, extended: bool) -> Identity:
    """Return what we know ourselves of a client; nothing of one on our own machine, which would tell nobody who."""
    if not address or is_loopback(address):
        return ()
    known = [("ADDR", address), ("PORT", str(port) if port else ""), ("PROTO", "ESMTP" if extended else "SMTP")]
    return tuple((name, value) for name, value in (*known, ("HELO", helo), ("SOURCE", "REMOTE")) if value)


def of_envelope(envelope: Envelope) -> Identity:
    """Return whose message this is, for a backup."""
    return envelope.identity or of_client(envelope.client_address, 0, envelope.client_helo, extended=True)
