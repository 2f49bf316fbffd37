"""What the system lets one process have open, and what of ours fits into that.

The limit of open files is raised to the hard one at the start, and ``smtp.max_connections`` cut to what fits below it:
descriptors for Redis, the spool and the primary are kept back, since a client is taken only while they are left. Each
client may need one at the primary as well, and the kernel hands over all that wait for accept() at once. A limit that
leaves no room for a few clients is a TooLow of one line.

Trouble of our own (no descriptor, no memory, no thread) says nothing about whoever was to be reached: ``is_own``.
"""

from __future__ import annotations

import contextlib
import errno
import math
import resource
import socket
from dataclasses import dataclass

RESERVE = 64  # descriptors of a process for all but clients and the primary: Redis, spool, look-ups, TLS files
_MOST = 1 << 20  # more is of no use, and some programs visit every descriptor that they might have
_BACKLOG = 1024  # connections that wait for accept()
_FEWEST = 8  # clients; with room for fewer a relay is not worth its start
_OWN = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN})

_OWN_NAMES = frozenset({socket.EAI_MEMORY, socket.EAI_SYSTEM})  # of a look-up, whose numbers are others


class TooLow(Exception):
    """The limit of open files is too low to start; the text is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits: clients of all relay processes and of one of them, and how many may wait for accept()."""

    clients: int
    clients_here: int
    backlog: int


def raise_files() -> int:
    """Raise the limit of open files as far as may be. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _MOST if soft == resource.RLIM_INFINITY else soft
    # macOS has a limit of its own below an infinite hard one.
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
    """Return what fits into relay processes with this limit, of so many clients wanted. Raises TooLow.

    ``sockets`` is the number of addresses to listen on. The kernel may give one process more clients than another, so
    that each has a bound of its own beside the common one.
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
    """Return how many connections to its backup a worker process may have, of so many wanted. Raises TooLow."""
    room = limit - RESERVE // 2
    if room < 1:
        least = RESERVE // 2 + _FEWEST
        raise TooLow(f"the limit of open files is {limit}, and at least {least} are needed: {_HOW}")
    return min(wanted, room)


_HOW = "raise it (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of docker)"


def is_own(error: BaseException | None) -> bool:
    """Say whether an error, or what caused it, is that we lack descriptors, memory or threads."""
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
