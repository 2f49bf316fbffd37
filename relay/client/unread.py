"""What the kernel still holds of a connection that asyncio reads no more.

A transport stops reading at EPIPE, but closes its socket only after ``connection_lost``: in between the rest can be
read, by way of another descriptor. Where that fails there is no rest.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

_OCTETS = 65536


def unread(transport: asyncio.Transport) -> Iterator[bytes]:
    """Yield the octets that have come but were not read."""
    with suppress(OSError, ValueError):
        descriptor = os.dup(transport.get_extra_info("socket").fileno())
        with socket.socket(fileno=descriptor) as copy:
            while data := copy.recv(_OCTETS, socket.MSG_DONTWAIT):
                yield data
