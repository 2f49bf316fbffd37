"""docs/json.md as data: the fields that each object of `--json` has, and the types that they have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from support.documents import ROOT

_ROW = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)
_FIELD = re.compile(
    r"`([a-zA-Z_.0-9]+)` ((?:list of |map of )?(?:string|integer|number|moment|boolean|object)(?: or null)?)(\?)?"
)
_LIKE = re.compile(r"(?:`([a-z_.]+)` )?[^`]*?(?:the fields of|those of) (?:`([^`]+)`|(times))")
_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "moment": (int, float),
    "boolean": (bool,),
    "object": (dict,),
}


@dataclass
class Fields:
    """Those of one object: type by name, and which may be missing."""

    types: dict[str, str] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)

    def add(self, other: Fields, within: str = "") -> None:
        prefix = f"{within}." if within else ""
        self.types = {prefix + name: kind for name, kind in other.types.items()} | self.types
        self.optional |= {prefix + name for name in other.optional}

    def faults(self, value: Mapping[str, Any], within: str = "") -> Iterator[str]:
        """Yield what is otherwise than documented."""
        names = {n[len(within) :] for n in self.types if n.startswith(within) and "." not in n[len(within) :]}
        for name in value.keys() - names:
            yield f"{within}{name} is not documented: {value[name]!r}"
        for name in names:
            full = within + name
            if name in value:
                yield from self._of(full, self.types[full], value[name])
            elif full not in self.optional:
                yield f"{full} is missing"

    def _of(self, name: str, kind: str, value: Any) -> Iterator[str]:
        kind, or_null, _ = kind.partition(" or null")
        if value is None:
            if not or_null:
                yield f"{name} is null, not {kind}"
            return
        shape, of, inner = kind.rpartition(" of ")
        if of and not isinstance(value, list if shape == "list" else dict):
            yield f"{name} is {value!r}, not a {kind}"
            return
        for one in (value if shape == "list" else value.values()) if of else [value]:
            if not isinstance(one, _TYPES[inner]) or (isinstance(one, bool) and inner != "boolean"):
                yield f"{name} is {one!r}, not {kind}"
            elif inner == "object":
                yield from self.faults(one, name + ".")


@cache
def documented() -> dict[tuple[str, str], Fields]:
    """Return the fields by command and kind, "" for an object without one."""
    found: dict[tuple[str, str], Fields] = {}
    named: list[tuple[tuple[str, str], str]] = []
    for command, text in _ROW.findall((ROOT / "docs" / "json.md").read_text("utf-8")):
        if command in {"command", "---"}:
            continue
        kind = re.match(r"`kind`: `([^`]+)`: ", text)
        key = (command.strip("`"), kind[1] if kind else "")
        fields = found[key] = Fields({"kind": "string"} if kind else {})
        rest = text[kind.end() :] if kind else text
        for name, what, optional in _FIELD.findall(rest):
            fields.types[name] = what
            if optional:
                fields.optional.add(name)
        named.append((key, rest))
    for key, text in named:
        for within, like, times in _LIKE.findall(text):
            found[key].add(found[(like or times, "")], within if within in found[key].types else "")
        if "about a route its fields" in text:
            found[key].add(found[("about a route", "")])
    return found
