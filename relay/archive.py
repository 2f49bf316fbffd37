"""The bodies of failed copies that Redis need not hold: beyond failed.max_bytes they move to files, the oldest first.

A file has the whole record; Redis keeps the record without its body, which names the host and the file, so that
listings stay complete on every host. A retry brings the body back. The file is written and synced before Redis
forgets the body, and deleted only when Redis has no such message any more. Trouble with the disk moves nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from redis import Redis

from relay import ledger, reading
from relay.envelope import BodyElsewhere, LockedRecord, MalformedRecord, Message

_SETTLED = 0.9  # moved until this part of the limit is left, so that the next failure moves nothing
_PAGE = 500


def folder(state_dir: Path) -> Path:
    """Return the folder of the moved bodies."""
    return state_dir.absolute() / "failed"


def fetch(place: BodyElsewhere) -> bytes:
    """Return the whole record of a moved body. Raises BodyElsewhere when its file is not here."""
    if place.host == socket.gethostname():
        try:
            with os.fdopen(os.open(place.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                # Whoever can write to Redis names the path: nothing that never ends.
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return file.read()
        except (OSError, ValueError) as error:
            raise place from error
    raise place


def restore(connection: Redis, ids: Sequence[str]) -> list[str]:
    """Bring bodies back into Redis that are in files here. Returns the ids whose bodies are elsewhere still."""
    missing = []
    for message_id in ids:
        record = cast("bytes | None", connection.get(ledger.MESSAGE + message_id))
        try:
            if record is not None:
                Message.unpack(record, message_id)
        except BodyElsewhere as place:
            try:
                # XX: what an operator has dropped meanwhile stays dropped.
                connection.set(ledger.MESSAGE + message_id, fetch(place), xx=True)
            except BodyElsewhere:
                missing.append(message_id)
        except MalformedRecord:
            pass  # found and told where it is delivered or shown
    return missing


def move_excess(
    connection: Redis, where: Path, limit: int, tick: Callable[[], object] = lambda: None
) -> Iterator[tuple[str, str]]:
    """Move bodies of failed copies to files while they have more than ``limit`` octets together in Redis.

    Yields (id, file). What is pending somewhere as well stays. Raises RedisError, OSError.
    """
    sizes: dict[str, tuple[float, int]] = {}  # id -> (when it failed first, octets)
    for name in ledger.destinations(connection):
        for page in reading.pages(connection, ledger.FAILED + name, size=_PAGE):
            tick()
            with connection.pipeline(transaction=False) as pipe:
                for message_id, _ in page:
                    pipe.strlen(ledger.MESSAGE + message_id)
                lengths = pipe.execute()
            for (message_id, at), length in zip(page, lengths, strict=True):
                before = sizes.get(message_id, (at, 0))[0]
                sizes[message_id] = (min(at, before), length)
    total = sum(length for _, length in sizes.values())
    if total <= limit:
        return
    for message_id in sorted(sizes, key=lambda i: sizes[i][0]):
        if total <= limit * _SETTLED:
            break
        tick()
        left = _move(connection, where, message_id)
        if left is not None:
            total -= sizes[message_id][1] - left
            yield message_id, str(where / message_id)


def forget_delivered(connection: Redis, where: Path) -> list[str]:
    """Delete the files of messages that Redis does not know any more. Returns their ids."""
    gone = []
    for path in sorted(where.iterdir()) if where.is_dir() else ():
        if not connection.exists(ledger.MESSAGE + path.name.partition(".")[0]):
            path.unlink()
            gone.append(path.name)
    return gone


def _move(connection: Redis, where: Path, message_id: str) -> int | None:
    """Move one body; returns what Redis still holds of it, None when it stays."""
    record = cast("bytes | None", connection.get(ledger.MESSAGE + message_id))
    if record is None:
        return None
    path = where / message_id
    try:
        with contextlib.suppress(LockedRecord):  # as good as any: it is moved as it is
            Message.unpack(record, message_id)
        stub = Message.stub(record, socket.gethostname(), str(path))
    except (BodyElsewhere, MalformedRecord):
        return None
    if len(stub) >= len(record):
        return None
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with connection.pipeline(transaction=True) as pipe:
        ledger.stow(pipe, message_id, stub)
        if not pipe.execute()[0]:
            path.unlink()  # it is wanted again, or gone
            return None
    return len(stub)
