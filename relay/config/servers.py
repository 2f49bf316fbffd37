"""The servers of the settings: the primary, the backups, those of [[server]] and of routes, and the routes themselves.

They are made of what was given (layers.py). What is wrong with one is noted there, with its place; the others are read
all the same. A primary or a backup that cannot be read is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from relay.config.consistency import own_addresses
from relay.config.destinations import conflicts, default_name, is_mx, read_destination, same_server
from relay.config.layers import GivenSettings
from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, ROUTE_FIELDS
from relay.config.routes import LMTP_FORK, Route, hidden, lmtp_faults, read_route
from relay.mail.destination import Destination

_NAMED = re.compile(r"([\w.:\-\[\]]+)=(.*)", re.DOTALL)


class Servers(NamedTuple):
    """Who the servers are."""

    primary: Destination | None
    demoted: Destination | None  # the primary as it would be a backup
    demoted_table: int  # the number of the [[backup]] that says so; 0: none
    backups: tuple[Destination, ...]
    others: tuple[Destination, ...]  # of [[server]], and those that only routes name
    routes: tuple[Route, ...]


def read_servers(given: GivenSettings, values: Mapping[str, Any]) -> Servers:
    """Return the servers; faults become problems of ``given``."""
    return _Reading(given, values).servers()


class _Reading:
    """One run of read_servers."""

    def __init__(self, given: GivenSettings, values: Mapping[str, Any]) -> None:
        self._given = given
        self._values = values
        self._connections = values["workers.connections"]  # the default of each backup
        self._of_backups = {name: dict(fields) for name, fields in given.of_backups.items()}  # not yet used

    def servers(self) -> Servers:
        """Return the servers."""
        values, demoted_table = self._values, 0
        primary = self._primary()
        sender, soft_bounce = values["relay.demoted"]
        demoted = replace(primary, sender=sender, soft_bounce=soft_bounce) if primary else None
        backups: list[tuple[Destination, str, str]] = []  # with key and origin
        backups += self._plain_backups()
        for n, (table, where) in enumerate(self._given.tables, 1):
            backup = self._server_table("backup", n, table, where)
            if backup and primary and _is_the_same(table, backup, primary) and not demoted_table:
                demoted, demoted_table = backup, n
            elif backup:
                backups.append((backup, f"backup[{n}]", where[""]))
        for name, field in [(name, field) for name, given in self._of_backups.items() for field in given]:
            self._given.unknown(name, [b.name for b, _, _ in backups], BACKUP_FLAGS[field], "backup")
        count = len(backups)
        for n, (table, where) in enumerate(self._given.servers, 1):
            server = self._server_table("server", n, table, where)
            backups += [(server, f"server[{n}]", where[""])] if server else []
        backups += list(self._by_domain([*([primary] if primary else []), *(b for b, _, _ in backups)]))
        found = tuple(backup for backup, _, _ in backups)
        for index, text in conflicts(primary, found, own_addresses(values)):
            if index < 0:
                self._given.wrong("relay.destination_primary", text)
            else:
                self._given.wrong(backups[index][1], text, backups[index][2])
        routes = self._routes([*([primary] if primary else []), *found])
        return Servers(primary, demoted, demoted_table, found[:count], found[count:], routes)

    def _by_domain(self, known: Sequence[Destination]) -> Iterator[tuple[Destination, str, str]]:
        """Yield the servers that only routes name, as mx:example.com, each with its key and origin."""
        names = {server.name.lower() for server in known}
        for n, (table, where) in enumerate(self._given.routes, 1):
            for field in ("primary", "servers", "backups") if isinstance(table, dict) else ():
                for text in filter(is_mx, _texts(table.get(field))):
                    if (name := default_name(text.strip())).lower() in names:
                        continue
                    names.add(name.lower())
                    server, _ = read_destination(text.strip(), {}, environ={}, connections=self._connections)
                    if server:  # else the route says what is wrong
                        yield server, f"route[{n}].{field}", where.get(field, where[""])

    def _plain_backups(self) -> Iterator[tuple[Destination, str, str]]:
        """Yield the backups of relay.destination_backups, each with its key and origin."""
        key = "relay.destination_backups"
        for n, text in enumerate(self._values[key], 1):
            label = f"{key}[{n}]" if len(self._values[key]) > 1 else key
            named = _NAMED.fullmatch(text)
            fields = {"name": named[1]} if named else {}
            if backup := self._backup(label, named[2] if named else text, fields, {"": self._given.given[key].origin}):
                yield backup, label, self._given.given[key].origin

    def _routes(self, servers: Sequence[Destination]) -> tuple[Route, ...]:
        """Return the routes."""
        found: list[tuple[int, Route]] = []
        listening = own_addresses(self._values)
        by_name = {server.name: server for server in servers}
        if self._values["routes.split"] == "fork" and any(server.scheme == "lmtp" for server in servers):
            self._given.wrong("routes.split", LMTP_FORK)
        known = [name for name, _, _ in ROUTE_FIELDS]
        for n, (table, where) in enumerate(self._given.routes, 1):
            label = f"route[{n}]"
            if not isinstance(table, dict):
                self._given.wrong(label, "expected a table with name = ... and primary = ...", where[""])
                continue
            for name in table:
                if name not in known:
                    self._given.unknown(name, known, where[name], "field of [[route]]", f"{label}.")
            route, faults = read_route(table, servers, listening, fold=self._values["routes.fold_local"])
            if route is not None:
                found.append((n, route))
                faults += lmtp_faults(route, by_name)
            for field, fault in faults:
                place = where.get(field) or where.get(field.partition(".")[0]) or where[""]
                self._given.wrong(f"{label}.{field}", fault, place)
        for index, text in hidden([route for _, route in found]):
            n = found[index][0]
            self._given.wrong(f"route[{n}]", text, self._given.routes[n - 1][1][""])
        return tuple(route for _, route in found)

    def _primary(self) -> Destination | None:
        values = self._values
        text = values["relay.destination_primary"]
        if not text:
            return None
        named = _NAMED.fullmatch(text)
        url, fields = (named[2], {"name": named[1]}) if named else (text, {})
        primary, faults = read_destination(url, fields, environ=self._given.environ, connections=self._connections)
        for _, fault in faults:
            self._given.wrong("relay.destination_primary", fault)
        if primary is None:
            return None
        most, age = values["relay.messages_per_connection"], values["relay.connection_age"]
        return replace(primary, messages_per_connection=most, connection_age=age)

    def _server_table(self, kind: str, number: int, table: Any, where: Mapping[str, str]) -> Destination | None:
        label = f"{kind}[{number}]"
        known = [field.key for field in BACKUP_FIELDS]
        if not isinstance(table, dict):
            self._given.wrong(label, "expected a table with url = ...", where[""])
            return None
        for name in table:
            if name not in known:
                self._given.unknown(name, known, where[name], f"field of [[{kind}]]", f"{label}.")
        rest = {name: value for name, value in table.items() if name in known and name != "url"}
        url = table.get("url")
        if not isinstance(url, str) or not url.strip():
            self._given.wrong(f"{label}.url", "expected host:port or a URL", where.get("url", where[""]))
            return None
        return self._backup(label, url.strip(), rest, where)

    def _backup(self, label: str, url: str, fields: Mapping[str, Any], where: Mapping[str, str]) -> Destination | None:
        """Read one backup with its flags, which refer to the name that it has without them."""
        connections = self._connections
        backup, faults = read_destination(url, fields, environ=self._given.environ, connections=connections)
        name = str(fields.get("name") or (backup.name if backup else url))
        if given := self._of_backups.pop(name, {}):
            where = {**where, **{field: BACKUP_FLAGS[field] for field in given}}
            fields = {**fields, **{field: value for field, value in given.items() if field != "url"}}
            url = given.get("url", url)
            backup, faults = read_destination(url, fields, environ=self._given.environ, connections=connections)
        for field, fault in faults:
            place = field or "url"
            is_apart = label.startswith(("backup[", "server[")) or place in where  # fields in a list have no place
            self._given.wrong(f"{label}.{place}" if is_apart else label, fault, where.get(place, where[""]))
        return backup


def _is_the_same(table: Any, backup: Destination, primary: Destination) -> bool:
    """Say whether a [[backup]] is meant to be the primary: by its name, which it has been given, and its address."""
    return "name" in table and backup.name == primary.name and same_server(backup, primary)


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, the names of a table, or the one text."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
    return [item for item in items if isinstance(item, str)]
