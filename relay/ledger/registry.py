"""The destinations that the ledger knows: all ever used, so that pending copies of a removed backup are delivered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from redis import Redis

from relay import maillog
from relay.ledger.changes import Pipe
from relay.ledger.keys import DESTINATIONS, LISTS
from relay.mail import ids
from relay.mail.destination import Destination

_told: set[bytes] = set()  # invalid names that have been logged


def register(pipe: Pipe, destinations: Iterable[Destination]) -> None:
    """Register destinations, so that their pending copies are delivered even when they leave the settings."""
    definitions = {d.name: d.to_json() for d in destinations}
    if definitions:
        pipe.hset(DESTINATIONS, mapping=definitions)
        pipe.sadd(LISTS, *definitions)


def register_now(connection: Redis, destinations: Iterable[Destination]) -> None:
    """Register destinations at once. Raises RedisError."""
    with connection.pipeline(transaction=True) as pipe:
        register(pipe, destinations)
        pipe.execute()


def destinations(connection: Any) -> dict[str, Destination]:
    """Return every destination ever used, by name."""
    found = connection.hgetall(DESTINATIONS)
    return dict(_defined(sorted(found.items())))


def _defined(found: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, Destination]]:
    """Yield the valid destinations; invalid entries are logged once, since data from Redis is not trusted."""
    for name, definition in found:
        try:
            destination = Destination.from_json(definition)
        except ValueError as error:
            _tell(name, str(error))
            continue
        if destination.name == ids.text(name):
            yield destination.name, destination
        else:
            _tell(name, f"it defines {destination.name}")


def _tell(name: bytes, reason: str) -> None:
    if name not in _told:
        _told.add(name)
        maillog.notice("error", "no destination", destination=ids.text(name), reason=reason)
