"""Moves the bodies of failed copies from Redis to files, the oldest first.

This happens beyond failed.max_bytes, and before Redis is so full that new mail would go to the spool. A file holds the
whole record and is synced before Redis drops the body; Redis keeps the rest of the record with the host and the path,
so that listings stay complete on every host. That path is for people only: a file is opened by the message id in this
process's own folder, and must be the record of that message. A retry brings the body back while there is room, else the
worker reads the file. A file is deleted only when the same ledger had moved it and lists it no more: a Redis that came
back empty or older knows none of the files, and they may be all that is left. After a disk failure nothing is moved.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from redis import Redis
from redis.exceptions import ResponseError

from relay import maillog, private_files
from relay.batches import batched
from relay.ledger import changes, keys, queries, registry
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import is_id, is_job_id
from relay.mail.record import BodyElsewhere, LockedRecord, Message

_SETTLED = 0.9  # bodies are moved down to this part of the limit, so that the next failure moves nothing
_PAGE = 500
_PRESSED, _RELIEVED = 0.55, 0.45  # of maxmemory: moving starts above the first, ends at the second
_ROOM = 0.58  # of maxmemory: up to where a retry brings bodies back
_COST = 1.25  # octets of memory for an octet of a record
_IDENTITY = "identity"  # the file with the identity of a folder; never a message id
_unknown: dict[Path, frozenset[str]] = {}  # folder -> unknown files that have been logged


def folder(state_dir: Path) -> Path:
    """Return the folder of the moved bodies."""
    return state_dir.absolute() / "failed"


def fetch(place: BodyElsewhere, message_id: str, where: Path | None) -> bytes:
    """Return the whole record of a moved body. Raises BodyElsewhere if its file is not in the folder ``where``."""
    if where is None or not is_id(message_id):
        raise place
    try:
        record = private_files.read(where, message_id)
        with contextlib.suppress(LockedRecord):  # the worker may have the key
            Message.unpack(record, message_id)
    except (FileNotFoundError, NotADirectoryError, MalformedRecord, BodyElsewhere) as error:
        raise place from error
    except OSError as error:
        # The file seems to be on this host, so the text must not send the operator to another one.
        trouble = f"which user {os.geteuid()} cannot read: {error.strerror}"
        if error.errno == errno.EACCES:
            trouble += f"; it and its folder must belong to the owner of {where.parent}, and to them alone"
        raise BodyElsewhere(place.host, str(where / message_id), trouble) from error
    return record


def restore(connection: Redis, ids: Sequence[str], where: Path | None) -> list[str]:
    """Bring moved bodies back into Redis while it has room. Returns the ids whose file is not here."""
    missing = []
    room = _room(connection)
    for message_id in ids:
        record = cast("bytes | None", connection.get(keys.MESSAGE + message_id))
        try:
            if record is not None:
                Message.unpack(record, message_id)
        except BodyElsewhere as place:
            try:
                found = fetch(place, message_id, where)
            except BodyElsewhere:
                missing.append(message_id)
                continue
            room -= _COST * len(found)
            if room < 0:
                break  # the workers read the rest from the files
            # XX: a message that was dropped meanwhile stays dropped.
            connection.set(keys.MESSAGE + message_id, found, xx=True)
        except MalformedRecord:
            pass  # reported when it is delivered or shown
    return missing


def memory(connection: Redis) -> tuple[int, int]:
    """Return the memory that Redis uses, and its maxmemory (0: none or unknown), in octets."""
    try:
        found = cast("dict[str, int]", connection.info("memory"))
    except ResponseError:
        return 0, 0
    return int(found.get("used_memory", 0)), int(found.get("maxmemory", 0))


def _room(connection: Redis) -> float:
    used, limit = memory(connection)
    return _ROOM * limit - used if limit else math.inf


def is_pressed(connection: Redis) -> bool:
    """Return whether Redis is so full that failed bodies must be moved."""
    return _pressure(connection) > 0


def _pressure(connection: Redis) -> float:
    """Return how many octets of records must be moved to relieve Redis."""
    used, limit = memory(connection)
    return (used - _RELIEVED * limit) / _COST if limit and used > _PRESSED * limit else 0.0


def move_excess(
    connection: Redis, where: Path, limit: int, tick: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, str]]:
    """Move bodies of failed copies to files while they exceed ``limit`` octets together, or Redis is full.

    Yields (id, file). A message that is also pending at a backup stays. Raises RedisError, OSError.
    """
    sizes: dict[str, tuple[float, int]] = {}  # id -> (when it failed first, octets)
    for name in registry.destinations(connection):
        for page in queries.pages(connection, keys.FAILED + name, size=_PAGE):
            tick()
            with connection.pipeline(transaction=False) as pipe:
                for message_id, _ in page:
                    pipe.strlen(keys.MESSAGE + message_id)
                lengths = pipe.execute()
            for (message_id, at), length in zip(page, lengths, strict=True):
                if is_id(message_id):  # since it becomes the name of a file
                    before = sizes.get(message_id, (at, 0))[0]
                    sizes[message_id] = (min(at, before), length)
    total = sum(length for _, length in sizes.values())
    goal = min(limit * _SETTLED if total > limit else total, total - _pressure(connection))
    for message_id in sorted(sizes, key=lambda i: sizes[i][0]):
        if total <= goal:
            break
        tick()
        left = _move(connection, where, message_id)
        if left is not None:
            total -= sizes[message_id][1] - left
            yield message_id, str(where / message_id)


def forget_delivered(connection: Redis, where: Path) -> list[str]:
    """Delete the files of messages that this ledger had moved and lists no more. Returns their ids.

    A file that the ledger does not know stays and is logged: it may be all that is left of a message.
    """
    files = [(private_files.written(name), name) for name in _names(where)]
    files = [(message_id, name) for message_id, name in files if is_id(message_id)]  # ignores foreign files
    if not files:
        return []
    identity = _identity(where)
    gone: list[str] = []
    unknown: list[str] = []
    for page in batched(files, _PAGE):
        with connection.pipeline(transaction=False) as pipe:
            changes.judge_files(pipe, identity, [message_id for message_id, _ in page])
            (verdicts,) = pipe.execute()
        settled = [file for file, verdict in zip(page, verdicts, strict=True) if verdict == changes.SETTLED]
        unknown += [name for (_, name), verdict in zip(page, verdicts, strict=True) if verdict == changes.UNKNOWN]
        for _, name in settled:
            (where / name).unlink(missing_ok=True)
            gone.append(name)
        if settled:
            connection.srem(keys.MOVED + identity, *(message_id for message_id, _ in settled))
    _tell_unknown(where, unknown)
    return gone


def _names(where: Path) -> list[str]:
    try:
        return sorted(path.name for path in where.iterdir())
    except FileNotFoundError:
        return []


def _tell_unknown(where: Path, names: Sequence[str]) -> None:
    """Log files that the ledger does not know, whenever the set of them changes."""
    if _unknown.get(where) != (found := frozenset(names)):
        _unknown[where] = found
        if names:
            text = "bodies of failed copies that Redis does not know are kept: see docs/failures.md to deliver them"
            maillog.notice("warning", text, folder=str(where), count=len(names), first=names[0])


def _identity(where: Path) -> str:
    """Return the identity of a folder in Redis, wherever it is mounted; a new folder gets one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        found = private_files.read(where, _IDENTITY, 64).decode("ascii", "replace").strip()
        if is_job_id(found):
            return found
    fresh = secrets.token_hex(8)
    private_files.write(where, _IDENTITY, fresh.encode("ascii"))
    return fresh


def _move(connection: Redis, where: Path, message_id: str) -> int | None:
    """Move one body; returns the octets that stay in Redis, None if it was not moved."""
    record = cast("bytes | None", connection.get(keys.MESSAGE + message_id))
    if record is None:
        return None
    try:
        with contextlib.suppress(LockedRecord):  # a sealed record is moved without opening it
            Message.unpack(record, message_id)
        stub = Message.stub(record, socket.gethostname(), str(where / message_id))
    except (BodyElsewhere, MalformedRecord):
        return None
    if len(stub) >= len(record):
        return None
    private_files.folder(where)
    identity = _identity(where)
    private_files.write(where, message_id, record)
    with connection.pipeline(transaction=True) as pipe:
        changes.stow(pipe, message_id, stub, identity)
        pipe.exists(keys.MESSAGE + message_id)
        stowed, is_there = pipe.execute()
    if not stowed:
        if is_there:  # pending again; if it is gone, forget_delivered decides about the file
            (where / message_id).unlink()
        return None
    return len(stub)
