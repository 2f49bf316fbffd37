"""What the conditions in an operator's words mean: read into the one filter of all that lists or changes copies.

The commands take them as flags and the page as a form, by the same names.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relay.config.types import NETWORKS, duration, integer, size
from relay.mail.text import printable
from workers.queues.selection import Attempts, Filter, code

Given = Mapping[str, Sequence[str]]  # what flags or a form say, by the names of the filter's fields


class BadCondition(ValueError):
    """A condition that cannot be meant; ``name`` is that of its flag or field."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("expected something: an empty text is in everything")
    return value


def _address(value: str) -> str:
    if "@" not in _text(value) and value != "<>":
        raise ValueError(f"expected an address or @domain, not {value!r}")
    return value.strip()


def _domain(value: str) -> str:
    if "@" in _text(value.strip().lstrip("@")).strip().lstrip("@"):
        raise ValueError(f"expected a domain, not {value!r}")
    return value.strip().lstrip("@")


def _group(value: str) -> str:
    found = value.strip().lower()
    if not re.fullmatch(r"[a-z]?[0-9a-f]{12}", found):
        raise ValueError(f"expected the key of a group as `smtp-dup divergence` shows it, not {value!r}")
    return found


_READERS: dict[str, Callable[[str], Any]] = {
    "destination": str,
    "sender": lambda value: "<>" if value == "" else _address(value),
    "recipient": _address,
    "domain": _domain,
    "client": NETWORKS.read,
    "reply": _text,
    "code": code,
    "group": _group,
    "attempts": Attempts.read,
    "older": duration().read,
    "newer": duration().read,
    "larger": size().read,
    "limit": integer(1).read,
}


def read(given: Given, ids: Sequence[str] = ()) -> Filter:
    """Read a filter. Raises BadCondition."""
    fields: dict[str, Any] = {}
    for name, values in given.items():
        if len(values) > 1:
            raise BadCondition(name, f"given {len(values)} times: a copy must meet every condition, so give it once")
        for value in values:
            try:
                fields[name] = _READERS[name](value)
            except ValueError as error:
                raise BadCondition(name, printable(str(error))) from None
    return Filter(tuple(dict.fromkeys(ids)), **fields)


_MOST_IDS = 5  # in words


def words(given: Given, ids: Sequence[str] = ()) -> str:
    """Return the conditions as they would stand on a command line, for the audit."""
    shown = [*ids[:_MOST_IDS], *([f"and {len(ids) - _MOST_IDS} more"] if len(ids) > _MOST_IDS else [])]
    flags = [f"--{name} {shlex.quote(value)}" for name, values in given.items() for value in values]
    return printable(" ".join([*shown, *flags]) or "--all")
