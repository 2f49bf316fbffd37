"""Who is the primary since when, by whose decision; and a decision that is being prepared. Their stored forms.

Names and roles only: what a name stands for, each host's settings say. An epoch counts the decisions; 0 is before the
first, when each host's settings say who is the primary. What is read back is data: what is not in every field what it
must be, is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from relay.mail.ids import is_destination_name
from relay.mail.stored import any_text, number, parsed
from relay.mail.text import printable

_MOST = 1 << 53  # what JSON's numbers keep whole
_LONGEST = 16 << 10  # octets of a stored form
_CUT = 300  # characters of a text
_Read = TypeVar("_Read")


class Unreadable(ValueError):
    """What is stored makes no sense; the text says why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who was made the primary, and by whom. ``at`` is seconds since the epoch by Redis's clock."""

    epoch: int
    primary: str
    backups: tuple[str, ...] = ()
    by: str = ""
    at: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Topology:
    """The decision that holds, and the one before: of the settings, with epoch 0, where it was the first."""

    now: Decision
    previous: Decision

    @property
    def epoch(self) -> int:
        return self.now.epoch

    @property
    def primary(self) -> str:
        return self.now.primary

    def to_json(self) -> str:
        return json.dumps({**asdict(self.now), "previous": asdict(self.previous)})

    @classmethod
    def from_json(cls, data: str | bytes) -> Topology:
        """Read the stored form. Raises Unreadable."""
        return _read(data, lambda found: cls(_decision(found), _decision(found["previous"])))


@dataclass(frozen=True, slots=True)
class Intent:
    """A promotion that is being prepared: every relay process is to say whether it could use the new primary.

    ``epoch`` is the one that would begin; ``old`` the primary that would be a backup, "" where nobody knows it.
    """

    id: str
    epoch: int
    primary: str
    old: str
    by: str
    at: float
    seconds: float  # until it ends by itself

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: str | bytes) -> Intent:
        """Read the stored form. Raises Unreadable."""
        return _read(data, _intent)


def _read(data: str | bytes, make: Callable[[dict[str, Any]], _Read]) -> _Read:
    if len(data) > _LONGEST:
        raise Unreadable("it is too long")
    try:
        found = parsed(data)
        return make(_object(found))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(printable(f"{type(error).__name__}: {error}")[:_CUT]) from error


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError("no object")
    return found


def _decision(found: dict[str, Any]) -> Decision:
    backups = found["backups"]
    if not isinstance(backups, list):
        raise TypeError("backups: not a list")
    return Decision(
        epoch=count(found["epoch"]),
        primary=_name(found["primary"]),
        backups=tuple(map(_name, backups)),
        by=text(found.get("by", "")),
        at=number(found.get("at", 0)),
        reason=text(found.get("reason", "")),
    )


def _intent(found: dict[str, Any]) -> Intent:
    return Intent(
        id=text(found["id"]),
        epoch=count(found["epoch"]),
        primary=_name(found["primary"]),
        old=_name(found["old"]) if found["old"] else "",
        by=text(found["by"]),
        at=number(found["at"]),
        seconds=number(found["seconds"]),
    )


def _name(value: Any) -> str:
    if not is_destination_name(value):
        raise TypeError("no name of a server")
    return value


def text(value: Any) -> str:
    """Return a text that can be shown, cut where it is long. Raises TypeError."""
    return printable(any_text(value)[:_CUT])


def count(value: Any) -> int:
    """Return a whole number, 0 or more. Raises TypeError."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise TypeError("no count")
    return value
