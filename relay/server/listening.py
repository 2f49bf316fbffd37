"""The listening sockets of all relay processes, bound by their supervisor or taken from systemd.

They are bound before any process runs, so that a port in use is one clear error at the start, and no connection is
refused while a crashed process is replaced.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from relay import maillog
from relay.config.loader import Settings
from relay.server import systemd
from relay.smtpd.credentials import Credentials
from relay.smtpd.shared_counters import ProcessCounters

_BACKLOG = 1024  # until the relay process sets its own by its descriptor limit
# The kernel has no IPv6, it is disabled, or no interface has the address.
_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}


@dataclass(frozen=True, slots=True)
class Place:
    """What one relay process gets from the supervisor: its sockets, and its part of the shared counters."""

    sockets: Sequence[socket.socket]
    counters: ProcessCounters
    plain: int  # the first ``plain`` sockets begin in plain text, the others with TLS
    ours: bool = True  # bound by the supervisor; else by systemd, and they go on listening after the end


def listen(settings: Settings) -> list[Place]:
    """Bind every listening address once per relay process, or share systemd's sockets among all of them.

    Returns a place for each process. Raises OSError with the setting or address in its text, and systemd.NotAsSet.
    """
    Credentials.load(settings.smtp)  # each process loads them again; this reports their errors at the start
    plain = [found for host, port in settings.smtp.addresses for found in _resolve(host, port)]
    tls = [found for host, port in settings.smtp.tls_addresses for found in _resolve(host, port)]
    every = ProcessCounters.shared_by(settings.smtp.process_count)
    if from_systemd := systemd.take(os.environ):
        sockets, plain_count = systemd.match(from_systemd, plain, tls)
        return [Place(sockets, counters, plain_count, ours=False) for counters in every]
    plain = [found for host, port in settings.smtp.addresses for found in _usable(host, port)]
    tls = [found for host, port in settings.smtp.tls_addresses for found in _usable(host, port)]
    addresses = plain + tls
    return [
        Place([_bind(family, address, share=True) for family, address in addresses], counters, len(plain))
        for counters in every
    ]


def _resolve(host: str, port: int) -> list[systemd.Address]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"smtp.listen: {host}:{port}: {error.strerror or error}") from error
    unique = dict.fromkeys((family, (str(address[0]), port)) for family, _, _, _, address in found)
    return list(unique)


def _usable(host: str, port: int) -> list[systemd.Address]:
    """Return those addresses of a listen setting that can be bound. Raises OSError.

    If the machine lacks an IPv6 address, it listens on the others and logs a warning.
    """
    usable: list[systemd.Address] = []
    missing: list[OSError] = []
    for family, address in _resolve(host, port):
        try:
            # SO_REUSEPORT would let a second smtp-dup share the port silently; a bind without it detects this.
            _bind(family, address, share=False).close()
        except OSError as error:
            if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                raise
            missing.append(error)
        else:
            usable.append((family, address))
    if missing and not usable:
        raise missing[0]
    for trouble in missing:
        maillog.notice("warning", "listening on IPv4 alone: this machine has no such IPv6 address", reason=str(trouble))
    return usable


def _bind(family: socket.AddressFamily, address: tuple[str, int], *, share: bool) -> socket.socket:
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        if share:
            sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        text = f"smtp.listen: cannot listen on {address[0]} port {address[1]}: {error.strerror}"
        clear = OSError(text)  # OSError(errno, text) would print the number first
        clear.errno = error.errno
        raise clear from error
    sock.setblocking(False)
    return sock
