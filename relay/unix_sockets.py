"""Unix sockets in the private state folder: a path of any length, closed to other users."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from relay import private_files

_LIMIT = 100  # octets of a socket's path on every system


def listening(folder: Path, name: str, backlog: int) -> socket.socket:
    """Return a socket that listens under a name in a folder, in place of whatever has that name. Raises OSError."""
    with _address(folder, name) as address:
        Path(address).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            mask = os.umask(0o177)
            try:
                listener.bind(address)
            finally:
                os.umask(mask)
            private_files.give(Path(address))
            listener.listen(backlog)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    return listener


def connected(folder: Path, name: str, *, patience: float | None) -> socket.socket | None:
    """Return a connection with this time-out, or None where nobody listens. Raises OSError where we may not.

    With a ``patience`` of 0 nothing is waited for: a listener that is busy is an error too.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(patience)
    try:
        with _address(folder, name) as address:
            sock.connect(address)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        sock.close()
        return None
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def _address(folder: Path, name: str) -> Iterator[str]:
    """Give the path of a socket in a folder, short enough for any: the system allows some 100 octets."""
    path = str(folder / name)
    if len(os.fsencode(path)) <= _LIMIT or not Path("/proc/self/fd").is_dir():
        yield path
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)
