"""Reads the tables of addresses that people have: Postfix's transport map (texthash), CSV, or one address a line.

By its look: a first line whose fields are known column names is a CSV's header; all else is ``key [value]``, where a
line that begins with blanks continues the one before. A value names who answers: a server's name, ``host:port`` or
``smtp:[host]:port``, several with commas in order; without one the route's own servers answer. A file with a fault is
none: BadTable names every faulty line, up to a few.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from relay.config.types import split_host_port
from relay.mail.address_keys import entry_key
from relay.mail.destination import Destination
from relay.mail.text import printable

_MOST_FAULTS = 20
_KEYS = ("recipient", "address", "email", "mail", "user", "username", "mailbox", "domain", "key")
_VALUES = ("server", "primary", "host", "destination", "target", "transport", "backend", "nexthop")
_ENABLED = ("enabled", "active")
_OFF = {"0", "no", "false", "off", "n"}
_TOKEN = re.compile(r'((?:"(?:[^"\\]|\\.)*"|[^\s"])+)(?:\s+(.*))?', re.DOTALL)
_TRANSPORT = re.compile(r"[A-Za-z][\w-]*:(?=.)")
_PORT = re.compile(r"(\[[^\]]*\]|[^:\[\]]+)(?::([0-9]{1,5}|smtp))?")


class BadTable(ValueError):
    """A table that cannot be used; ``faults`` has a line for each reason."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True, slots=True)
class Row:
    """An entry: the names of the servers that answer, none for the route's own, and its line in the file."""

    servers: tuple[str, ...]
    line: int


def parse(text: str, servers: Sequence[Destination], *, fold: bool) -> dict[str, Row]:
    """Return the entries of a table by key; of two with the same key the first counts. Raises BadTable."""
    find = _finder(servers)
    rows: dict[str, Row] = {}
    faults: list[str] = []
    for line, key, value in entries(text, faults):
        try:
            rows.setdefault(entry_key(key, fold=fold), Row(find(value), line))
        except ValueError as error:
            faults.append(f"line {line}: {printable(key)[:80]}: {error}")
        if len(faults) >= _MOST_FAULTS:
            faults.append("and perhaps more")
            break
    if faults:
        raise BadTable(faults)
    return rows


def entries(text: str, faults: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (line, key, value) of each entry as it stands there; ``faults`` gets what cannot be read at all."""
    lines = text.removeprefix("\ufeff").splitlines()
    header = next((n for n, line in enumerate(lines) if line.strip() and not line.lstrip().startswith("#")), None)
    if header is not None and (columns := _columns(lines[header])):
        yield from _csv(lines, header, columns, faults)
    else:
        yield from _texthash(lines)


def _texthash(lines: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    logical, begin = "", 0
    for number, line in enumerate([*lines, "end"], 1):
        bare = line.strip()
        if number <= len(lines) and (not bare or bare.startswith("#")):
            continue
        if line[0].isspace() and logical:
            logical += " " + bare
            continue
        if logical:
            found = _TOKEN.fullmatch(logical)
            key, value = (found[1], found[2] or "") if found else (logical, "")
            yield begin, key, value
        logical, begin = bare, number


def _columns(line: str) -> tuple[int, int | None, int | None, str] | None:
    """Return which columns hold key, value and enabled, and the separator; None where this is no header."""
    separator = max(",;\t", key=line.count)
    if not line.count(separator) and line.strip().lower() not in _KEYS:
        return None
    names = [name.strip().strip('"').lower() for name in line.split(separator)]
    found = [next((names.index(n) for n in known if n in names), None) for known in (_KEYS, _VALUES, _ENABLED)]
    return (found[0], found[1], found[2], separator) if found[0] is not None else None


def _csv(
    lines: Sequence[str], header: int, columns: tuple[int, int | None, int | None, str], faults: list[str]
) -> Iterator[tuple[int, str, str]]:
    key, value, enabled, separator = columns
    reader = csv.reader(lines[header + 1 :], delimiter=separator, strict=True)
    try:
        for fields in reader:
            line = header + 1 + reader.line_num
            if not any(field.strip() for field in fields) or fields[0].lstrip().startswith("#"):
                continue
            if len(fields) <= max(key, value or 0, enabled or 0):
                faults.append(f"line {line}: it has {len(fields)} fields, fewer than the header")
                continue
            if enabled is not None and fields[enabled].strip().lower() in _OFF:
                continue
            yield line, fields[key], fields[value].strip() if value is not None else ""
    except csv.Error as error:
        faults.append(f"line {header + 1 + reader.line_num}: no CSV: {error}; what follows is not read")


def _finder(servers: Sequence[Destination]) -> Callable[[str], tuple[str, ...]]:
    """Return what finds the servers that a value names."""
    by_name = {server.name.lower(): server.name for server in servers}
    by_place = {(server.host.lower(), server.port): server.name for server in servers}
    known: dict[str, tuple[str, ...]] = {"": ()}

    def find(value: str) -> tuple[str, ...]:
        """Return their names. Raises ValueError."""
        found = known.get(value)
        if found is None:
            found = known[value] = tuple(dict.fromkeys(one(part.strip()) for part in value.split(",") if part.strip()))
        return found

    def one(text: str) -> str:
        bare = _TRANSPORT.sub("", text, count=1)
        for form in (text, bare, bare.strip("[]")):
            if form.lower() in by_name:
                return by_name[form.lower()]
        for form in (text, bare):
            if (place := _place(form)) in by_place:
                return by_place[place]
        there = ", ".join(by_name.values()) or "none"
        raise ValueError(f'"{printable(text)[:80]}" is no server of the settings: there are {there}')

    return find


def _place(text: str) -> tuple[str, int]:
    found = _PORT.fullmatch(text)
    if found is None:
        return "", 0
    try:
        host, _ = split_host_port(found[1], 25)
    except ValueError:
        host = found[1].strip("[]")
    return host.lower().strip("[]"), int(found[2]) if found[2] and found[2] != "smtp" else 25
