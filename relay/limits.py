"""The limit of open files, and how many clients and connections fit below it.

At the start the limit is raised to the hard limit, and ``smtp.max_connections`` is reduced to what fits: descriptors
for Redis and the spool are reserved, each client may need another one for the primary, and the kernel hands over all
connections in the accept queue at once. A limit without room for a few clients raises TooLow, a text of one line.

``is_own`` recognises errors of this process (no descriptor, memory or thread), which say nothing about the server that
was to be reached.
"""

from __future__ import annotations

import contextlib
import errno
import math
import resource
import socket
from dataclasses import dataclass

RESERVE = 64  # descriptors of a process besides those for clients and the primary: Redis, spool, DNS, TLS files
_MOST = 1 << 20  # more is useless, and some programs iterate over all possible descriptors
_BACKLOG = 1024  # connections in the accept queue
_FEWEST = 8  # clients; with room for fewer, the relay does not start
_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})

_OWN_NAMES = frozenset({socket.EAI_MEMORY, socket.EAI_SYSTEM})  # of getaddrinfo, which has its own error numbers


class TooLow(Exception):
    """The limit of open files is too low to start; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits: clients of all relay processes, clients of one, and the length of its accept queue."""

    clients: int
    clients_here: int
    backlog: int


def raise_files() -> int:
    """Raise the limit of open files to the hard limit, at most ``_MOST``. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST if soft == resource.RLIM_INFINITY else soft
    # macOS has another limit below an infinite hard limit.
    for limit in (wanted, 10_240):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
            return max(soft, limit)
    return soft


def files() -> int:
    """Return the limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else soft


def relay_fit(limit: int, wanted: int, processes: int, sockets: int = 0) -> Fit:
    """Return how many of the ``wanted`` clients fit into relay processes with this limit. Raises TooLow.

    ``sockets`` is the number of addresses to listen on. The kernel may give one process more clients than another, so
    each has a limit of its own besides the common one.
    """
    room = limit - RESERVE - 2 * sockets  # two families
    share = math.ceil(wanted / processes)
    backlog = min(_BACKLOG, max(16, room // 5))
    if room >= wanted + share + _BACKLOG:
        return Fit(wanted, wanted, _BACKLOG)
    share = min(share, (room - backlog) // 2)
    if share < min(_FEWEST, math.ceil(wanted / processes)):
        least = RESERVE + 2 * sockets + 2 * _FEWEST + 16
        raise TooLow(f"the limit of open files is {limit}, and at least {least} are needed: {_HOW}")
    return Fit(min(wanted, share * processes), min(wanted, room - backlog - share), backlog)


def worker_connections(limit: int, wanted: int) -> int:
    """Return how many of the ``wanted`` connections a worker process may have to its backup. Raises TooLow."""
    room = limit - RESERVE // 2
    if room < 1:
        least = RESERVE // 2 + _FEWEST
        raise TooLow(f"the limit of open files is {limit}, and at least {least} are needed: {_HOW}")
    return min(wanted, room)


_HOW = "raise it (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker)"


def is_own(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is that this process lacks descriptors, memory or threads."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError):
            return True
        if isinstance(error, OSError) and error.errno in (_OWN_NAMES if isinstance(error, socket.gaierror) else _OWN):
            return True
        if isinstance(error, RuntimeError) and "start new thread" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
