"""Whose mailbox has moved to which server: the map's entries, its state, and its changes. Their stored forms.

A key is an address or @domain as relay.mail.address_keys has it; for what has no entry the routes hold. Each change is
a generation with an identity of its own, and names the one before: so whoever has an earlier one sees whether this
follows from it. What is read back is data: what is not in every field what it must be, is none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from relay.mail.ids import is_destination_name
from relay.mail.stored import number, shown
from relay.topology.state import Unreadable, count, ordinal, read_or_why, read_stored

_LONGEST_ENTRY = 4 << 10  # octets of a stored form
_LONGEST_KEY = 1 << 10
_LONGEST_STATE = 4 << 10
MOVE, MOVE_BACK, MOVE_ALL, REPAIR = "move", "move --back", "move --all", "move --repair"  # as the audit calls them
NOTE = 200  # characters of an operator's words


class MovedEntry(NamedTuple):
    """The server that answers for an address or a domain, since when (by Redis's clock), by whom, and why."""

    server: str
    at: float = 0.0
    by: str = ""
    note: str = ""

    def to_json(self) -> str:
        return json.dumps(self)

    @classmethod
    def from_json(cls, data: bytes | str | None) -> MovedEntry:
        """Read the stored form. Raises Unreadable."""
        if data is None:
            raise Unreadable("there is none")
        return read_stored(data, cls.of, _LONGEST_ENTRY)

    @classmethod
    def of(cls, found: Any) -> MovedEntry:
        """Make one of what was parsed. Raises ValueError, TypeError."""
        server, at, by, note = found
        if not is_destination_name(server):
            raise TypeError("no name of a server")
        return cls(server, number(at), shown(by), shown(note))


Changes = Mapping[str, MovedEntry | None]  # key -> its new entry, None where it has none any more


@dataclass(frozen=True, slots=True)
class MapState:
    """What generation the map has, how many entries, since when and by whom; generation 0: nobody has ever moved.

    ``servers`` says how many entries name each server, as far as they make sense.
    ``id`` is the generation's own, ``lineage`` that of all which follow from one first. A generation from ``whole`` on
    follows from the ones before it; one with a lower generation than that is replaced by it, whatever it was.
    """

    generation: int = 0
    id: str = ""
    lineage: str = ""
    whole: int = 0
    count: int = 0
    at: float = 0.0
    by: str = ""
    servers: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, data: Any) -> tuple[MapState | None, str]:
        """Read what was found as the state: None before the first move, or why it is none."""
        return read_or_why(data, cls.from_json)

    @classmethod
    def from_json(cls, data: bytes | str) -> MapState:
        """Read the stored form. Raises Unreadable."""
        return read_stored(data, cls.of, _LONGEST_STATE)

    @classmethod
    def of(cls, found: Any) -> MapState:
        """Make one of what was parsed. Raises ValueError, TypeError, KeyError."""
        made = cls(
            generation=ordinal(found["generation"]),
            id=shown(found["id"]),
            lineage=shown(found["lineage"]),
            whole=ordinal(found["whole"]),
            count=count(found["count"]),
            at=number(found["at"]),
            by=shown(found["by"]),
            servers={name: count(n) for name, n in found["servers"].items() if is_destination_name(name)},
        )
        if not made.generation or not made.id or made.whole > made.generation:
            raise ValueError("no generation")
        return made


class MapStep(NamedTuple):
    """What one generation changed; ``before`` is the identity of the one that it follows from."""

    generation: int
    id: str
    before: str
    changes: Changes

    def to_json(self) -> str:
        return json.dumps([self.generation, self.id, self.before, self.changes])

    @classmethod
    def from_json(cls, data: bytes | str) -> MapStep:
        """Read the stored form. Raises Unreadable."""

        def made(found: Any) -> MapStep:
            generation, id_, before, changes = found
            return cls(ordinal(generation), shown(id_), shown(before), changes_of(changes))

        return read_stored(data, made, len(data))  # a step may have any number of changes


def changes_of(found: Any) -> dict[str, MovedEntry | None]:
    """Make changes of what was parsed. Raises ValueError, TypeError, AttributeError."""
    made = {key: entry if entry is None else MovedEntry.of(entry) for key, entry in found.items()}
    if not all(map(is_key, made)):
        raise ValueError("no address")
    return made


def is_key(key: str) -> bool:
    """Say whether this can be a key of the map: an address or a domain, that fits on a line."""
    return "@" in key and len(key) <= _LONGEST_KEY and key.isprintable() and not key.endswith("@")
