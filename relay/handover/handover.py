"""The relay's side of the hand-over: it finds the workers of this host, and offers them copies as they are released.

A worker that has room takes a copy: the release leases the copy to it in the same step, and its record, which is still
in memory, goes to it over a socket, so that the first try begins at once. All else is left to the copy's RQ job, which
every copy gets in any case. So is mail that comes densely (density.py). Nothing here
waits, and nothing raises.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from relay import maillog, private_files, unix_sockets
from relay.handover.density import Density
from relay.handover.frames import LARGEST, HandedCopy, Hello, folder_of, ledger_of
from relay.handover.worker_line import Ids, WorkerLine

_LOOK_SECONDS = 0.5
_TOLD = 100  # names that the log has
_AT_HAND = 256  # records kept from their stage to their release


class Offer:
    """A copy of one message for each of its destinations, as far as workers have room: to be taken or given up."""

    def __init__(self, message_id: str, record: bytes, lines: Sequence[WorkerLine | None]) -> None:
        self._id = message_id
        self._record = record
        self._lines = lines
        self._takers = [line for line in lines if line is not None]
        self.at = time.monotonic()  # no lease of it began earlier
        for line in self._takers:
            line.reserve(len(record))

    @property
    def holders(self) -> tuple[str, ...]:
        """The worker for each destination, "" for none."""
        return tuple(line.hello.worker if line and line.hello else "" for line in self._lines)

    def has(self, number: int) -> bool:
        """Say whether a worker takes the copy for that destination."""
        return self._lines[number] is not None

    def send(self, accepted_at: float) -> None:
        """Hand over what has been released."""
        copy = HandedCopy(self._id, self.at, accepted_at, self._record)
        for line in self._takers:
            line.send(copy)

    def give_up(self) -> None:
        """Hand nothing over."""
        for line in self._takers:
            line.give_up(len(self._record))


class Handover:
    """The workers of this host, as one relay process knows them."""

    def __init__(self, state_dir: Path | None = None, redis_url: str = "") -> None:
        """Without a folder it finds nobody."""
        self._folder = folder_of(state_dir) if state_dir else None
        self._ledger = ledger_of(redis_url)
        self._lines: dict[str, WorkerLine] = {}  # by the name of their socket
        self._records: dict[str, bytes] = {}  # of what is staged, by id
        self._density = Density()
        self._foreign: set[str] = set()  # names that are no sockets of ours, told of once
        self.on_handed: Callable[[str, Ids], None] = lambda _destination, _ids: None
        self.on_refused: Callable[[Hello, Sequence[HandedCopy]], None] = lambda _holder, _copies: None

    async def follow(self) -> None:
        """Keep connected to the workers that listen; runs until cancelled."""
        while self._folder is not None:
            self._look(self._folder)
            await asyncio.sleep(_LOOK_SECONDS)

    def keep(self, message_id: str, record: Sequence[bytes], destinations: Sequence[str]) -> None:
        """Keep the record of a staged message at hand, where somebody may take it."""
        if (
            not self._lines
            or self._density.is_high()
            or sum(map(len, record)) > LARGEST
            or not any(self._line_of(name, 0) for name in destinations)
        ):
            return
        self._records[message_id] = b"".join(record)
        while len(self._records) > _AT_HAND:
            del self._records[next(iter(self._records))]

    def forget(self, message_id: str) -> None:
        """Forget a record: the message is not released now."""
        self._records.pop(message_id, None)

    def offer(self, message_id: str, destinations: Sequence[str]) -> Offer | None:
        """Offer the copies of a message that is about to be released; None where nobody takes any."""
        record = self._records.pop(message_id, None)
        if record is None:
            return None
        lines = [self._line_of(name, len(record)) for name in destinations]
        return Offer(message_id, record, lines) if any(lines) else None

    def close(self) -> None:
        """Hang up on all."""
        for line in self._lines.values():
            line.close()

    def _line_of(self, destination: str, size: int) -> WorkerLine | None:
        """Return the line to the worker of a destination with the most room for a copy of this size."""
        found, most = None, 0
        for line in self._lines.values():
            hello = line.hello
            if hello is not None and hello.destination == destination and (room := line.room_for(size)) > most:
                found, most = line, room
        return found

    def _look(self, folder: Path) -> None:
        """Connect to workers that have come, forget those that have gone."""
        for name in [name for name, line in self._lines.items() if not line.is_open]:
            del self._lines[name]
        with suppress(OSError):
            if not private_files.is_closed(folder):
                self._pass_over(folder)
                return
            for path in folder.iterdir():
                if path.suffix == ".sock" and path.name not in self._lines:
                    if private_files.is_socket_of_ours(path.lstat()):
                        self._connect(folder, path.name)
                    else:
                        self._pass_over(path)

    def _pass_over(self, path: Path) -> None:
        """Leave alone what others could have put there: whoever listened on it would get mail."""
        if path.name not in self._foreign and len(self._foreign) < _TOLD:
            self._foreign.add(path.name)
            maillog.notice("warning", "no copy is handed over there: it is not ours alone; remove it", path=str(path))

    def _connect(self, folder: Path, name: str) -> None:
        try:
            sock = unix_sockets.connected(folder, name, patience=0)
        except OSError:  # a busy one: it is asked again
            return
        if sock is None:
            with suppress(OSError):
                (folder / name).unlink()  # left by a dead one: it listened before it had this name
            return
        loop = asyncio.get_running_loop()
        self._lines[name] = WorkerLine(name, sock, loop, self.on_handed, self.on_refused, self._ledger)
