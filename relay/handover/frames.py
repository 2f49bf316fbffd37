"""What goes over the socket between a relay process and a worker: the worker's hello and limits, the relay's copies.

A worker listens in the state folder. It says to who connects which destination it serves, under which name it takes
leases, and in which Redis; then, again and again, how many copies and octets it takes in all on this connection: a
limit that grows as copies are done with, and falls to what has come when no more are wanted. The relay sends copies
within the limit, each with its record. Both ends belong to one user; what an end says is checked all the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from relay.mail.ids import is_destination_name, is_id
from relay.mail.stored import parsed, to_json

LARGEST = 64 << 10  # octets of a record: a larger one is left to its job
FRESH_SECONDS = 5.0  # for which a copy's lease is certain to be ours: what comes later is claimed like any other

_HELLO = 1024  # octets
_LATEST = 1e11  # seconds since the epoch
_LIMITS = struct.Struct("!QQ")  # copies, octets
_COPY = struct.Struct("!I16sdd")  # octets of the record, id, monotonic time of the lease, time accepted


class BadFrame(ValueError):
    """The other end says what makes no sense; it is hung up on."""


class Hello(NamedTuple):
    """Who listens: a worker by the name that it takes leases under; ``ledger`` is the ``ledger_of`` its Redis."""

    destination: str
    worker: str
    ledger: str

    def packed(self) -> bytes:
        return to_json(list(self)).encode("ascii") + b"\n"


class Limits(NamedTuple):
    """How many copies, and octets of records, a worker takes in all on a connection."""

    copies: int
    octets: int

    def packed(self) -> bytes:
        return _LIMITS.pack(*self)


class HandedCopy(NamedTuple):
    """A released copy. ``leased_at`` is the monotonic time of its lease, ``accepted_at`` is by the clock of Redis."""

    id: str
    leased_at: float
    accepted_at: float
    record: bytes

    def packed(self) -> bytes:
        return _COPY.pack(len(self.record), self.id.encode("ascii"), self.leased_at, self.accepted_at) + self.record


def folder_of(state_dir: Path) -> Path:
    """Return the folder of the sockets."""
    return state_dir.absolute() / "handover"


def ledger_of(redis_url: str) -> str:
    """Return which Redis an address means, without its password."""
    return hashlib.sha256(redis_url.encode()).hexdigest()[:32]


def read_hello(received: bytearray) -> Hello | None:
    """Take a hello from what has come, None while it is not whole. Raises BadFrame."""
    line, newline, rest = bytes(received).partition(b"\n")
    if not newline:
        if len(received) > _HELLO:
            raise BadFrame("no hello")
        return None
    received[:] = rest
    try:
        destination, worker, ledger = parsed(line)
    except (ValueError, TypeError) as error:
        raise BadFrame("no hello") from error
    is_worker = isinstance(worker, str) and 0 < len(worker) <= _HELLO and worker.isascii() and " " not in worker
    if not (is_destination_name(destination) and is_worker and isinstance(ledger, str)):
        raise BadFrame("a hello that names nobody")
    return Hello(destination, worker, ledger)


def read_limits(received: bytearray) -> Limits | None:
    """Take all limits from what has come; returns the last one, None where none has come."""
    whole = len(received) // _LIMITS.size * _LIMITS.size
    if not whole:
        return None
    last = Limits(*_LIMITS.unpack_from(received, whole - _LIMITS.size))
    del received[:whole]
    return last


def read_copies(received: bytearray) -> Iterator[HandedCopy]:
    """Take all whole copies from what has come. Raises BadFrame."""
    at = 0
    try:
        while len(received) - at >= _COPY.size:
            size, name, leased_at, accepted_at = _COPY.unpack_from(received, at)
            message_id = name.decode("ascii", "replace")
            if size > LARGEST or not is_id(message_id) or not 0 <= accepted_at < _LATEST:
                raise BadFrame("no copy")
            begin = at + _COPY.size
            if len(received) - begin < size:
                break
            at = begin + size
            yield HandedCopy(message_id, leased_at, accepted_at, bytes(memoryview(received)[begin:at]))
    finally:
        del received[:at]
