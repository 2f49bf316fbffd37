"""Listening sockets that systemd has bound for us: socket activation, sd_listen_fds(3).

It binds a port below 1024 without a right of ours, and clients wait instead of being refused while we are restarted.
The sockets and the settings must name the same addresses, since the settings tell what begins with TLS and what is a
loop. Where they differ nothing is started: NotAsSet says what is where.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, MutableMapping, Sequence

_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
_ADVICE = "ListenStream= of the socket unit and smtp.listen must name the same addresses"

Address = tuple[socket.AddressFamily, tuple[str, int]]


class NotAsSet(Exception):
    """What was passed cannot be used, or is not what the settings name; the text says what."""


def take(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the sockets that were passed to this process; none where no socket unit started it.

    The variables are taken away: whoever we start has no part in this. Raises NotAsSet.
    """
    count, pid, _ = (environ.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    return [_adopt(descriptor) for descriptor in range(_FIRST, _FIRST + int(count))]


def _adopt(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise NotAsSet(f"descriptor {descriptor} was passed, but is no socket: {error.strerror}") from error
    if sock.family not in {socket.AF_INET, socket.AF_INET6} or sock.type != socket.SOCK_STREAM or not listens:
        raise NotAsSet(f"descriptor {descriptor} was passed, but does not listen for TCP: ListenStream=PORT is needed")
    sock.setblocking(False)
    return sock


def match(
    passed: Sequence[socket.socket], plain: Sequence[Address], tls: Sequence[Address]
) -> tuple[list[socket.socket], int]:
    """Return the sockets, those of the ``plain`` addresses first, and how many of these there are. Raises NotAsSet."""
    kinds: dict[bool, list[socket.socket]] = {False: [], True: []}
    missing = dict.fromkeys([*plain, *tls])
    for sock in passed:
        own = [address for address in (*plain, *tls) if _covers(sock, address)]
        begins_with_tls = {address in tls for address in own}
        if len(begins_with_tls) != 1:  # none of ours, or one for both kinds
            raise NotAsSet(f"{_name(_of(sock))} was passed, the settings have {_names((*plain, *tls))}. {_ADVICE}")
        kinds[begins_with_tls.pop()].append(sock)
        for address in own:
            missing.pop(address, None)
    if missing:
        has = _names(map(_of, passed))
        raise NotAsSet(f"{_names(missing)} was not passed, only {has}. {_ADVICE}")
    return kinds[False] + kinds[True], len(kinds[False])


def _covers(sock: socket.socket, address: Address) -> bool:
    """Say whether clients of an address come to this socket: one for IPv6 may take IPv4, too."""
    family, (host, port) = _of(sock)
    if (family, (host, port)) == address:
        return True
    both = family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return both and host == "::" and address == (socket.AF_INET, ("0.0.0.0", port))  # noqa: S104


def _of(sock: socket.socket) -> Address:
    host, port = sock.getsockname()[:2]
    return socket.AddressFamily(sock.family), (host, port)


def _names(addresses: Iterable[Address]) -> str:
    return ", ".join(map(_name, addresses))


def _name(address: Address) -> str:
    family, (host, port) = address
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
