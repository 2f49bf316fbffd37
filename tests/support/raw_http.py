"""HTTP as bytes: what no client library would send."""

from __future__ import annotations

import socket


def talk(port: int, request: bytes) -> bytes:
    """Send this and return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def try_talk(port: int, request: bytes = b"GET /healthz HTTP/1.0\r\n\r\n") -> bytes:
    """Do the same; nothing where the connection breaks."""
    try:
        return talk(port, request)
    except OSError:
        return b""
