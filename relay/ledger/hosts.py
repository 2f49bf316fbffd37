"""What each host says of itself: its role and its spool, and whether it gets through to the servers.

One entry for each installation, by its place. Who stops takes it away; who has not been heard of for a day is left out.
Times are Redis's own. What is read back is data; what makes no sense is no host.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay.ledger import changes, keys
from relay.ledger.changes import Pipe
from relay.mail import ids
from relay.mail.stored import number, parsed, shown, texts

LATE = 60.0  # seconds after which a host that has said nothing is not heard any more
_FORGOTTEN = 86400.0
_MOST = 1000
_MOST_STILL = 100
_CUT = 300  # characters of a text


@dataclass(frozen=True, slots=True)
class Host:
    """An installation: its role (up, relay, workers), its processes, what its spool holds; ``age`` of this news."""

    place: str
    host: str
    role: str
    processes: int
    spool_messages: int
    spool_oldest_s: float
    age: float
    still: tuple[str, ...] = ()  # processes that stand still, each with its pid

    @property
    def relays(self) -> bool:
        return self.role != "workers"

    @property
    def delivers(self) -> bool:
        return self.role != "relay"


@dataclass(frozen=True, slots=True)
class Reach:
    """What came of a host's last connection to a server: ``text`` says why not, or how long it took.

    ``gave_mail``: MAIL was said, too. ``verified`` says whether tls = verify would let it through, None where nobody
    looked; ``certificate_ends`` is when its certificate does, seconds since the epoch, 0 where that is not known.
    """

    destination: str
    place: str
    host: str
    ok: bool
    text: str
    gave_mail: bool
    verified: bool | None
    why_unverified: str
    certificate_ends: float
    age: float


def place_of(state_dir: Path, redis_url: str) -> str:
    """Return a stable name of this installation: the host and the state folder, which two installations never share.

    With Redis on a Unix socket the host is left out: there is only one, and a recreated container changes its name.
    """
    host = "" if redis_url.startswith("unix:") else f"{socket.gethostname()} "
    return f"{host}{state_dir.absolute()}"


def tell(
    pipe: Pipe,
    place: str,
    role: str,
    processes: int,
    messages: int,
    oldest_s: float,
    now: float,
    still: Iterable[str] = (),
) -> None:
    """Say that a host lives, what its spool holds, and which of its processes stand still."""
    words = {
        "host": socket.gethostname(),
        "role": role,
        "processes": processes,
        "spool": [messages, round(oldest_s, 1)],
        "still": [name[:_CUT] for name in still][:_MOST_STILL],
        "at": now,
    }
    pipe.hset(keys.HOSTS, place, json.dumps(words))


def tell_reach(pipe: Pipe, found: Reach, now: float) -> None:
    """Say what came of a connection."""
    words = {
        "host": found.host,
        "ok": found.ok,
        "text": found.text[:_CUT],
        "mail": found.gave_mail,
        "verified": found.verified,
        "why": found.why_unverified[:_CUT],
        "ends": found.certificate_ends,
        "at": now,
    }
    pipe.hset(keys.REACH, f"{found.destination} {found.place}", json.dumps(words))


def leave(connection: Any, place: str) -> None:
    """Take away what a host has said of itself. What it found out of servers stays for whoever comes there next."""
    connection.hdel(keys.HOSTS, place)


def read(connection: Any) -> list[Host]:
    """Return every host that is not forgotten, by name. Raises RedisError."""
    now = changes.now(connection)
    found = [_host(ids.text(place), data, now) for place, data in _entries(connection, keys.HOSTS)]
    return sorted((h for h in found if h and h.age < _FORGOTTEN), key=lambda h: (h.host, h.place))


def reaches(connection: Any, destination: str) -> list[Reach]:
    """Return what came of each host's last connection to a server. Raises RedisError."""
    now = changes.now(connection)
    found = [_reach(ids.text(field), data, now) for field, data in _entries(connection, keys.REACH)]
    return sorted(
        (r for r in found if r and r.destination == destination and r.age < _FORGOTTEN),
        key=lambda r: (r.host, r.place),
    )


def _entries(connection: Any, key: str) -> list[tuple[bytes, bytes]]:
    pipe = connection.pipeline(transaction=False)
    pipe.hgetall(key)
    (found,) = pipe.execute(raise_on_error=False)
    return list(found.items())[:_MOST] if isinstance(found, dict) else []  # another type of key: there is none


def _host(place: str, data: bytes, now: float) -> Host | None:
    try:
        found = parsed(data)
        messages, oldest = found["spool"]
        return Host(
            place=shown(place),
            host=shown(found["host"]),
            role=shown(found["role"]),
            processes=int(number(found["processes"])),
            spool_messages=int(number(messages)),
            spool_oldest_s=number(oldest),
            age=abs(now - number(found["at"])),
            still=tuple(map(shown, texts(found.get("still", []))[:_MOST_STILL])),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _reach(field: str, data: bytes, now: float) -> Reach | None:
    destination, _, place = field.partition(" ")
    try:
        found = parsed(data)
        verified = found["verified"]
        return Reach(
            destination=destination,
            place=shown(place),
            host=shown(found["host"]),
            ok=found["ok"] is True,
            text=shown(found["text"]),
            gave_mail=found["mail"] is True,
            verified=verified if isinstance(verified, bool) else None,
            why_unverified=shown(found["why"]),
            certificate_ends=number(found["ends"]),
            age=abs(now - number(found["at"])),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
