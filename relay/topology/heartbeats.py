"""The relay processes' signs of life: each says once a second, in Redis, that it lives and which roles it follows.

A process that has been silent for ten seconds counts as dead, and is forgotten after a day; one that stops takes its
sign away. While Redis is away nobody can say anything, and nothing is concluded from that: times are Redis's own.
What is read back is data; what makes no sense is no process.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis

from relay import __version__
from relay.ledger import changes, keys
from relay.ledger.changes import Pipe
from relay.mail import ids
from relay.mail.ids import is_destination_name
from relay.mail.stored import number, parsed, shown, texts
from relay.topology.state import count, ordinal

DEAD_AFTER = 10.0  # seconds of silence
# How the trouble of one begins that goes by the map of who has moved all the same.
UNSAVED = "its copy of who has moved cannot be written"
_FORGOTTEN_AFTER = 86400.0
_MOST = 10_000  # processes that are read
_NOT_TOLD = {"process", "topology", "moves", "intent"}  # of a Pulse: its key, and what the beat brings back


class Pulse:
    """What one relay process says of itself; whoever changes one of its fields has it told with the next beat."""

    def __init__(self, place: str, name: str, pid: int) -> None:
        """``place`` is where it runs, see relay.ledger.hosts.place_of: there, one process has its name."""
        self.process = f"{place} {name}"
        self.name = name
        self.pid = pid
        self.epoch = 0
        self.primary = ""  # the name of the one that it follows
        self.generation = 0  # of the settings
        self.prepared = ""  # the intent for which it could use the new primary
        self.trouble = ""  # why it cannot follow, or could not prepare
        self.in_old = 0  # transactions that go on with an earlier primary
        self.down: list[str] = []  # servers of routes that it cannot use, so that others answer
        self.routes: list[str] = []  # that were decided about, and are followed
        self.moved = 0  # the generation of the map of moved mailboxes that it goes by
        self.moved_trouble = ""  # why that is not the one in Redis
        self.servers: list[str] = []  # names of all that its settings name
        self.settings: dict[str, str] = {}  # what its settings mean by each name: see relay.topology.agreement
        self.topology: str | None = None  # as Redis has told it last, "" for none; None before it has
        self.moves: str | None = None  # likewise: the state of the map of moved mailboxes
        self.intent = ""

    def ask(self, pipe: Pipe) -> None:
        """Add a beat to a pipeline (relay.ledger.monitor.Errand)."""
        told = {name: value for name, value in vars(self).items() if name not in _NOT_TOLD}
        told |= {"host": socket.gethostname(), "version": __version__}
        changes.beat(pipe, self.process, json.dumps(told).removeprefix("{"))

    def take(self, answer: Any) -> None:
        """Take what the beat brought back; an error changes nothing."""
        if isinstance(answer, list) and len(answer) == 3:
            self.topology, self.intent, self.moves = map(ids.text, answer)


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last sign of life of a relay process; ``age`` is how long ago that was, in seconds."""

    process: str
    host: str
    name: str
    pid: int
    version: str
    epoch: int
    primary: str
    generation: int
    prepared: str
    trouble: str
    in_old: int
    at: float
    age: float
    down: tuple[str, ...] = ()  # servers of routes that it cannot use
    routes: frozenset[str] | None = None  # that were decided about, and are followed; None: of an older version
    moved: int | None = None  # the generation of the map of moved mailboxes; None: a version that knows none
    moved_trouble: str = ""
    servers: tuple[str, ...] = ()  # names of all that its settings name
    settings: dict[str, str] | None = None  # a digest for each server and route; None: of an older version

    def goes_by(self, routes: Iterable[str]) -> bool:
        """Return whether it follows what was decided about these routes."""
        return (self.routes or frozenset()).issuperset(routes)

    @property
    def is_unsaved(self) -> bool:
        """Whether it goes by the map of who has moved, and would not after a start without Redis."""
        return self.moved_trouble.startswith(UNSAVED)

    @property
    def is_alive(self) -> bool:
        return self.age < DEAD_AFTER

    @property
    def label(self) -> str:
        """How people call it: relay-b/3."""
        return f"{self.host}/{self.name.removeprefix('relay-')}"


def read(connection: Redis) -> list[Heartbeat]:
    """Return the last sign of every relay process that is not forgotten, by host and name. Raises RedisError."""
    with connection.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.hgetall(keys.RELAYS)
        (seconds, micros), found = pipe.execute(raise_on_error=False)
    if isinstance(found, Exception):  # another type of key: there is none
        return []
    now = seconds + micros / 1e6
    beats = [_beat(ids.text(name), data, now) for name, data in list(found.items())[:_MOST]]
    return sorted((b for b in beats if b and b.age < _FORGOTTEN_AFTER), key=lambda b: (b.host, len(b.name), b.name))


def living(beats: Iterable[Heartbeat]) -> list[Heartbeat]:
    """Return those that have been heard of lately."""
    return [beat for beat in beats if beat.is_alive]


def forget(connection: Redis, process: str, siblings: Iterable[str] = ()) -> None:
    """Take a process's sign away, or those of all at its place but ``siblings``: what is not started there is not.

    Raises RedisError.
    """
    place, _, _ = process.rpartition(" ")
    kept = {f"{place} {name}" for name in siblings}
    found = map(ids.text, cast("list[bytes]", connection.hkeys(keys.RELAYS))) if kept else (process,)
    gone = [name for name in found if name.rpartition(" ")[0] == place and name not in kept]
    if gone:
        connection.hdel(keys.RELAYS, *gone)


def forget_old(connection: Redis) -> int:
    """Forget whoever has been silent for a day, and what is no sign of a process. Raises RedisError."""
    known = {beat.process for beat in read(connection)}
    found = cast("list[bytes]", connection.hkeys(keys.RELAYS))
    gone = [name for name in found if ids.text(name) not in known]
    return int(connection.hdel(keys.RELAYS, *gone)) if gone else 0


def _beat(process: str, data: bytes, now: float) -> Heartbeat | None:
    try:
        found = parsed(data)
        at, settings = number(found["at"]), None
        if "settings" in found:
            settings = {shown(name): shown(digest) for name, digest in list(found["settings"].items())[:_MOST]}
        return Heartbeat(
            process=shown(process),
            host=shown(found["host"]),
            name=shown(found["name"]),
            pid=count(found["pid"]),
            version=shown(found["version"]),
            epoch=ordinal(found["epoch"]),
            primary=shown(found["primary"]),
            generation=count(found["generation"]),
            prepared=shown(found["prepared"]),
            trouble=shown(found["trouble"]),
            in_old=count(found["in_old"]),
            at=at,
            age=abs(now - at),
            down=_names(found.get("down", [])),
            moved=ordinal(found["moved"]) if "moved" in found else None,
            moved_trouble=shown(found.get("moved_trouble", "")),
            servers=_names(found.get("servers", [])),
            settings=settings,
            routes=frozenset(texts(found["routes"])) if "routes" in found else None,
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _names(found: Any) -> tuple[str, ...]:
    return tuple(name for name in texts(found) if is_destination_name(name))
