"""[[route]]: which server answers for which mail, and which get copies of it; read, and checked against the others.

Nothing here reads a table file: relay.routing does. Each fault is (field, text), and all of a route are found at once.
"""

from __future__ import annotations

import difflib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from relay.config.destinations import Faults, default_name, hosts_of, is_mx, read_destination
from relay.config.types import OptionType, choice, duration, listen_addresses, quoted
from relay.mail.address_keys import covers, entry_key
from relay.mail.addresses import Network
from relay.mail.destination import Destination
from relay.mail.ids import is_route_name

DEFAULT_ROUTE = "default"  # what no route matches: relay.destination_primary, or who was promoted, and every [[backup]]
RETURN_AFTER = 300.0
MATCH_FIELDS = ("recipients", "senders", "clients", "listen")
LMTP_FORK = "fork is not possible with LMTP, which answers the dot once for each recipient"
_FILE = "file:"
_COPIES, _SPLIT = choice("backups", "others"), choice("defer", "fork")
_STICK = choice("recipient", "sender", "client", "message")
T = TypeVar("T")
_EXPECTED_SERVERS = "a server, a list of servers in order, or weights such as {a = 3, b = 1}"


@dataclass(frozen=True, slots=True)
class Entries:
    """Addresses: keys (relay.mail.address_keys), and files with more of them. Without either it matches all."""

    keys: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    @property
    def are_given(self) -> bool:
        return bool(self.keys or self.files)


@dataclass(frozen=True, slots=True)
class Match:
    """What a route is for; what is empty matches everything."""

    recipients: Entries = Entries()
    senders: Entries = Entries()
    clients: tuple[Network, ...] = ()
    listen: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """One [[route]]; servers are named. ``weights``, if there are any, belong to ``servers`` one by one."""

    name: str
    match: Match
    servers: tuple[str, ...]
    weights: tuple[float, ...] = ()
    backups: tuple[str, ...] = ()
    copies: str = "backups"
    split: str = "defer"
    stick: str = "recipient"
    return_after: float = RETURN_AFTER

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.match.recipients.files, *self.match.senders.files)

    @property
    def answering(self) -> tuple[str, ...]:
        """Names of the servers that may answer: a weight of 0, which only a command can set, takes none."""
        if not self.weights:
            return self.servers
        return tuple(name for name, weight in zip(self.servers, self.weights, strict=True) if weight)

    @property
    def first(self) -> str:
        """Name of the server that answers for most."""
        if not self.weights:
            return self.servers[0]
        return max(zip(self.weights, self.servers, strict=True), key=lambda found: found[0])[1]

    @property
    def copied(self) -> tuple[str, ...]:
        """Names of the servers to which it may owe copies."""
        return (*self.backups, *(self.servers if self.copies == "others" else ()))

    def in_words(self) -> str:
        """Return it on a line."""
        match = self.match
        words = [f"{name}={shown}" for name, shown in (
            ("recipients", _shown(match.recipients)),
            ("senders", _shown(match.senders)),
            ("clients", ",".join(map(str, match.clients))),
            ("listen", ",".join(f"{host}:{port}" for host, port in match.listen)),
        ) if shown] or ["all"]  # fmt: skip
        if self.weights:
            shares = ",".join(f"{n}:{w:g}" for n, w in zip(self.servers, self.weights, strict=True))
            words.append(f"-> {shares} stick={self.stick}")
        else:
            words.append(f"-> {','.join(self.servers)}")
        words += [f"backups={','.join(self.backups)}"] * bool(self.backups)
        words += [f"copies={self.copies}"] * (self.copies != "backups")
        words += [f"split={self.split}"] * (self.split != "defer")
        words += [f"return_after={self.return_after:g}"] * (self.return_after != RETURN_AFTER)
        return " ".join(words)


def _shown(entries: Entries) -> str:
    shown = [*entries.keys[:5], *(["..."] if len(entries.keys) > 5 else []), *(f"{_FILE}{f}" for f in entries.files)]
    return ",".join(shown)


def read_route(
    table: Mapping[str, Any],
    servers: Sequence[Destination],
    listening: Sequence[tuple[str, int]],
    *,
    fold: bool,
) -> tuple[Route | None, Faults]:
    """Make a Route of its table; None where there are faults."""
    reading = _Reading(table, servers, fold=fold)
    route = reading.route(listening)
    return (None if reading.faults else route), reading.faults


class _Reading:
    """One route, and its faults so far."""

    def __init__(self, table: Mapping[str, Any], servers: Sequence[Destination], *, fold: bool) -> None:
        self._table = table
        self._known = {server.name.lower(): server for server in servers}
        self._fold = fold
        self.faults: Faults = []

    def route(self, listening: Sequence[tuple[str, int]]) -> Route:
        table = self._table
        name = table.get("name")
        if not is_route_name(name) or name.lower() == DEFAULT_ROUTE:
            self._wrong("name", f'expected letters, digits and . _ - only, and not "{DEFAULT_ROUTE}"')
            name = ""
        match = self._match(table.get("match", {}), listening)
        field = "servers" if "servers" in table and "primary" not in table else "primary"
        if "servers" in table and "primary" in table:
            self._wrong("servers", "is another word for primary: give one of them")
        servers, weights = self._servers(field, table.get(field))
        backups = self._names("backups", table.get("backups", []))
        for name_of_both in sorted(set(servers) & set(backups)):
            self._wrong("backups", f"{name_of_both} is primary and backup of this route")
        copies = self._chosen("copies", _COPIES, "backups")
        split = self._chosen("split", _SPLIT, "defer")
        stick = self._chosen("stick", _STICK, "recipient")
        if "stick" in table and not weights and servers:
            self._wrong("stick", "has a meaning only with weights")
        if copies == "others" and len(servers) == 1:
            self._wrong("copies", "others has a meaning only with several servers")
        if "return_after" in table and len(servers) == 1:
            self._wrong("return_after", "has a meaning only with several servers")
        after = self._chosen("return_after", duration(zero=True), RETURN_AFTER)
        return Route(name, match, servers, weights, backups, copies, split, stick, after)

    def _wrong(self, field: str, text: str) -> None:
        self.faults.append((field, text))

    def _chosen(self, field: str, kind: OptionType, default: T) -> T:
        try:
            found: T = kind.read(self._table.get(field, default))
        except ValueError as error:
            self._wrong(field, str(error))
            return default
        return found

    # --- servers --------------------------------------------------------------------------------------------------

    def _servers(self, field: str, value: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
        if isinstance(value, Mapping) and value:
            wrong = [
                n for n, w in value.items() if isinstance(w, bool) or not isinstance(w, int | float) or not 0 < w < 1e9
            ]
            for name in wrong:
                self._wrong(
                    field, f"expected a weight of {quoted(name)} that is more than 0, not {quoted(value[name])}"
                )
            names = self._names(field, list(value))
            if wrong or len(names) != len(value):
                return names, ()
            return names, tuple(map(float, value.values()))
        names = self._names(field, [value] if isinstance(value, str) and value else value or [])
        if not names and not any(f == field for f, _ in self.faults):
            self._wrong(field, f"expected {_EXPECTED_SERVERS}")
        return names, ()

    def _names(self, field: str, value: Any) -> tuple[str, ...]:
        """Return the names of servers as the settings have them."""
        if isinstance(value, str):
            value = [value] if value else []
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            expected = _EXPECTED_SERVERS if field != "backups" else "a list of servers"
            self._wrong(field, f"expected {expected}, not {quoted(value)}")
            return ()
        found: list[str] = []
        for item in value:
            server = self._known.get(item.strip().lower()) or self._known.get(default_name(item.strip()).lower())
            if server is None and is_mx(item.strip()):
                _, faults = read_destination(item.strip(), {}, environ={}, connections=0)
                self.faults += [(field, f"{fault}; not {quoted(item)}") for _, fault in faults]
            elif server is None:
                near = difflib.get_close_matches(item.lower(), self._known, 1)
                meant = f"did you mean {self._known[near[0]].name}?" if near else self._there_are()
                self._wrong(field, f"no server is named {quoted(item)}; {meant}")
            elif server.name in found:
                self._wrong(field, f"{server.name} is named twice")
            else:
                found.append(server.name)
        return tuple(found)

    def _there_are(self) -> str:
        names = ", ".join(server.name for server in self._known.values())
        return f"there are {names}" if names else "there is none"

    # --- what it is for -------------------------------------------------------------------------------------------

    def _match(self, value: Any, listening: Sequence[tuple[str, int]]) -> Match:
        if not isinstance(value, Mapping):
            self._wrong("match", f"expected a table with {', '.join(MATCH_FIELDS)}")
            return Match()
        for name in value:
            if name not in MATCH_FIELDS:
                near = difflib.get_close_matches(name, MATCH_FIELDS, 1)
                self._wrong(f"match.{name}", "unknown condition" + (f"; did you mean {near[0]}?" if near else ""))
        return Match(
            self._entries("recipients", value.get("recipients")),
            self._entries("senders", value.get("senders")),
            self._clients(value.get("clients")),
            self._listen(value.get("listen"), listening),
        )

    def _texts(self, field: str, value: Any) -> list[str]:
        items = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
            self._wrong(f"match.{field}", f"expected a text or a list of texts, not {quoted(value)}")
            return []
        return [text for item in items if (text := item.strip())]

    def _entries(self, field: str, value: Any) -> Entries:
        keys: list[str] = []
        files: list[Path] = []
        for text in self._texts(field, value):
            if text.startswith(_FILE):
                path = Path(text.removeprefix(_FILE))
                if not path.is_absolute():
                    self._wrong(f"match.{field}", f"expected {_FILE}/absolute/path, not {quoted(text)}")
                files.append(path)
                continue
            try:
                keys.append(entry_key(text, fold=self._fold))
            except ValueError as error:
                self._wrong(f"match.{field}", f"{error}, or {_FILE}/path; not {quoted(text)}")
        return Entries(tuple(dict.fromkeys(keys)), tuple(dict.fromkeys(files)))

    def _clients(self, value: Any) -> tuple[Network, ...]:
        found: list[Network] = []
        for text in self._texts("clients", value):
            try:
                found.append(ipaddress.ip_network(text))
            except ValueError as error:
                hint = " (it has host bits set)" if "host bits" in str(error) else ""
                self._wrong("match.clients", f"expected a network such as 10.0.0.0/8, not {quoted(text)}{hint}")
        return tuple(found)

    def _listen(self, value: Any, listening: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        found: list[tuple[str, int]] = []
        for text in self._texts("listen", value):
            try:
                found += listen_addresses(text)
            except ValueError as error:
                self._wrong("match.listen", f"{error}, not {quoted(text)}")
        for host, port in found:
            if not any(is_at(own_host, own_port, host, port) for own_host, own_port in listening):
                there = ", ".join(f"{h}:{p}" for h, p in listening)
                self._wrong("match.listen", f"we do not listen on {host}:{port}; smtp.listen has {there}")
        return tuple(found)


def is_at(own_host: str, own_port: int, host: str, port: int) -> bool:
    """Return whether a connection to one of our own addresses may be one to host:port; "" stands for any host."""
    anywhere = {"", "0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    return own_port == port and (host in anywhere or own_host in anywhere or bool(hosts_of(own_host) & hosts_of(host)))


# Between routes -----------------------------------------------------------------------------------------------


def hidden(routes: Sequence[Route]) -> Iterator[tuple[int, str]]:
    """Yield (index, text) of each route that never matches, since an earlier one takes all that it would, and more."""
    for index, route in enumerate(routes):
        for earlier in routes[:index]:
            if earlier.name.lower() == route.name.lower():
                yield index, f'the name "{route.name}" is taken by an earlier route; names must differ'
                break
            if _hides(earlier.match, route.match):
                yield index, f"never matches: {earlier.name} above it takes all that it would"
                break


def _hides(earlier: Match, later: Match) -> bool:
    return (
        _all_within(earlier.recipients, later.recipients)
        and _all_within(earlier.senders, later.senders)
        and (not earlier.clients or (bool(later.clients) and all(_inside(n, earlier.clients) for n in later.clients)))
        and (not earlier.listen or (bool(later.listen) and all(_is_among(*a, earlier.listen) for a in later.listen)))
    )


def _is_among(host: str, port: int, others: Iterable[tuple[str, int]]) -> bool:
    return any(other in {"", host} and other_port == port for other, other_port in others)


def _all_within(earlier: Entries, later: Entries) -> bool:
    if not earlier.are_given:
        return True
    keys = frozenset(earlier.keys)
    return later.are_given and set(later.files) <= set(earlier.files) and all(covers(keys, key) for key in later.keys)


def _inside(network: Network, others: Iterable[Network]) -> bool:
    return any(network.version == other.version and network.subnet_of(other) for other in others)  # type: ignore[arg-type]  # one version


def lmtp_faults(route: Route, servers: Mapping[str, Destination]) -> Iterator[tuple[str, str]]:
    """Yield what the protocol of its servers does not allow."""
    if route.split == "fork" and any(servers[name].scheme == "lmtp" for name in route.servers):
        yield "split", LMTP_FORK
