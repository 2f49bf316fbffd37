"""Binds the address of the status server before the first fork: the socket outlives who answers on it."""

from __future__ import annotations

import errno
import os
import socket

from relay.config.model import Settings


def bind(settings: Settings) -> socket.socket | None:
    """Bind the address of the status server; None when it is off. Raises OSError with the address in its text."""
    if settings.status.address is None:
        return None
    host, port = settings.status.address
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:  # IPv6 is there, but disabled
                    raise
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        # create_server repeats the address in its text.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(f"status.listen: cannot listen on {settings.status.listen}: {reason}") from error
