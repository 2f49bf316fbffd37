"""Listening sockets passed by systemd: socket activation, sd_listen_fds(3).

systemd can bind a port below 1024, so smtp-dup needs no privilege, and clients wait during a restart instead of being
refused. The socket unit and the settings must name the same addresses, since the settings define which ports begin with
TLS and which destination would be a loop. If they differ, nothing is started and NotAsSet names both.
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
    """A passed socket cannot be used, or does not match the settings; the text says which."""


def take(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """Return the sockets that systemd passed to this process, [] without a socket unit. Raises NotAsSet.

    The variables are removed from ``environ``, so that child processes do not see them.
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
    """Return the sockets, those of the ``plain`` addresses first, and the number of these. Raises NotAsSet."""
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
    """Return whether this socket accepts connections to an address; an IPv6 socket may accept IPv4 too."""
    family, (host, port) = _of(sock)
    if (family, (host, port)) == address:
        return True
    both = family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return both and host == "::" and address == (socket.AF_INET, ("0.0.0.0", port))  # noqa: S104 - compared


def _of(sock: socket.socket) -> Address:
    host, port = sock.getsockname()[:2]
    return socket.AddressFamily(sock.family), (host, port)


def _names(addresses: Iterable[Address]) -> str:
    return ", ".join(map(_name, addresses))


def _name(address: Address) -> str:
    family, (host, port) = address
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
