"""Loads and validates the settings: a file, then SMTP_DUP_* variables, then flags -> one frozen Settings.

The table in options.py defines what can be set. Validation does not stop at the first fault: SettingsError holds every
problem, one line each, with its place (file and line, variable or flag) and without any secret.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from relay import ownership
from relay.config.agreement import disagreements, own_addresses
from relay.config.destinations import conflicts, default_name, is_mx, read_destination, resolve_password, same_server
from relay.config.model import DEMOTED_ORIGIN, PARTS, Layers, Settings, Shown, describe
from relay.config.options import (
    BACKUP_FIELDS,
    BACKUP_FLAGS,
    BY_KEY,
    ENV_PREFIX,
    OPTIONS,
    ROUTE_FIELDS,
    SECTIONS,
    Option,
    render,
)
from relay.config.routes import Route, hidden, lmtp_faults, read_route
from relay.mail.destination import Destination
from relay.mail.text import printable

if TYPE_CHECKING:
    from relay.config.file import FileContent

__all__ = [
    "OPTIONS",
    "Option",
    "Problem",
    "Settings",
    "SettingsError",
    "Shown",
    "describe",
    "load",
    "render",
    "resolve_password",
]

DIRECTORIES = (Path(), Path("/etc/smtp-dup"))
TABLES = ("backup", "server", "route")  # [[...]] of a file
FILE_NAMES = ("settings.toml", "config.yaml")
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
DEFAULTS_VARIABLE = ENV_PREFIX + "DEFAULTS"  # a file of defaults (container image); other files override it
_OURS = (CONFIG_VARIABLE, DEFAULTS_VARIABLE)
# Kubernetes sets these in every container if there is a service named smtp-dup...; they are no settings.
_KUBERNETES = re.compile(r"SMTP_DUP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
# A field of one backup given by a flag; a backup with its name in front (a host has no "=").
_OF_BACKUP = re.compile(r"backup\[(.*)\]\.(\w+)")
_NAMED = re.compile(r"([\w.:\-\[\]]+)=(.*)", re.DOTALL)
_BARE_LINE = re.compile(rf"\s*(\[({'|'.join(SECTIONS)})\]\s*)?(#.*)?")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: the key (or variable, or field), its place, and what was expected."""

    key: str
    where: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)

    @property
    def in_file(self) -> bool:
        """Whether it stands in a settings file, and not in a flag or a variable."""
        return bool(self.where) and not self.where.startswith(("-", ENV_PREFIX, "environment"))


class SettingsError(Exception):
    """The settings cannot be used; ``problems`` holds all reasons, one line each.

    ``state_dir`` is the state folder as far as the settings could be read, None where nothing was.
    """

    def __init__(self, problems: Sequence[Problem], state_dir: Path | None = None) -> None:
        self.problems = list(problems)
        self.state_dir = state_dir
        super().__init__("\n".join(map(str, self.problems)))


# Loading ------------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    value: Any
    origin: str


def load(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    directories: Sequence[Path] = DIRECTORIES,
    *,
    require_primary: bool = True,
    running: Layers | None = None,
) -> Settings:
    """Read and validate the settings. Raises SettingsError with all problems.

    ``flags`` maps a key to its text, lists comma-separated; the key "config" names the only file to read, and
    "backup[NAME].FIELD" sets a field of one backup, wherever the backup is defined. Options that take a restart keep
    the values of ``running``.
    """
    loader = _Loader(dict(flags or {}), os.environ if environ is None else environ)
    loader.take_layers(directories)
    if running:
        loader.keep(running)
    return loader.load(require_primary)


def load_layers(layers: Layers, environ: Mapping[str, str], *, require_primary: bool = True) -> Settings:
    """Read the settings from what was given elsewhere. Raises SettingsError."""
    loader = _Loader({}, environ)
    loader.given = {key: _Given(*given) for key, given in layers.given.items() if key in BY_KEY}
    loader.tables = [(table, dict(where)) for table, where in layers.tables]
    loader.of_backups = {name: dict(fields) for name, fields in layers.of_backups.items()}
    loader.servers = [(table, dict(where)) for table, where in layers.servers]
    loader.routes = [(table, dict(where)) for table, where in layers.routes]
    return loader.load(require_primary)


class _Loader:
    """One run of load(): the values given so far, and their problems."""

    def __init__(self, flags: dict[str, str], environ: Mapping[str, str]) -> None:
        self.flags = flags
        self.environ = environ
        self.given: dict[str, _Given] = {}
        self.tables: list[tuple[Any, dict[str, str]]] = []  # [[backup]]: its fields, and the place of each
        self.of_backups: dict[str, dict[str, str]] = {}  # name -> fields that flags give
        self.servers: list[tuple[Any, dict[str, str]]] = []  # [[server]]
        self.routes: list[tuple[Any, dict[str, str]]] = []  # [[route]]
        self.problems: list[Problem] = []
        self.strange_variables: list[str] = []
        self.connections = 0  # workers.connections, the default of each backup
        self.demoted_table = 0  # the number of the [[backup]] that says how the primary would get copies; 0: none
        self.file_failed = False  # what seems to be missing may stand there

    def take_layers(self, directories: Sequence[Path]) -> None:
        """Take what is given, the later layer wins."""
        self._layer_defaults()
        self._layer_file(directories)
        self._layer_environment()
        self._layer_flags()
        self._check_variables()

    def keep(self, running: Layers) -> None:
        """Have what takes a restart as it runs."""
        for option in OPTIONS:
            if option.takes_restart:
                self.given.pop(option.key, None)
                if option.key in running.given:
                    self.given[option.key] = _Given(*running.given[option.key])

    def load(self, require_primary: bool) -> Settings:
        """Make the settings of what was given. Raises SettingsError."""
        of_backups = {n: dict(f) for n, f in self.of_backups.items()}
        layers = Layers(dict(self.given), list(self.tables), of_backups, list(self.servers), list(self.routes))
        values = self._values()
        if isinstance(values["state_dir"], Path):
            ownership.trust(values["state_dir"])
        primary, demoted, backups, servers = self._destinations(values)
        routes = self._routes(values, [*([primary] if primary else []), *backups, *servers])
        if require_primary and not values["relay.destination_primary"]:
            self._primary_is_missing()
        for key, text in disagreements(values):
            self._wrong(key, text)
        if self.problems:
            raise SettingsError(self.problems, values["state_dir"])
        sections: dict[str, Any] = {
            name: kind(**{f.name: values[f"{name}.{f.name}"] for f in fields(kind)}) for name, kind in PARTS.items()
        }
        origins = {key: given.origin for key, given in self.given.items()}
        origins |= {
            f"backup[{n}]" if n != self.demoted_table else DEMOTED_ORIGIN: where[""]
            for n, (_, where) in enumerate(self.tables, 1)
        }
        origins |= {f"server[{n}]": where[""] for n, (_, where) in enumerate(self.servers, 1)}
        origins |= {f"route[{n}]": where[""] for n, (_, where) in enumerate(self.routes, 1)}
        return Settings(
            **sections,
            state_dir=values["state_dir"],
            primary=primary,
            demoted=demoted,
            backups=backups,
            origins=origins,
            layers=layers,
            servers=servers,
            route_table=routes,
        )

    def _primary_is_missing(self) -> None:
        option = BY_KEY["relay.destination_primary"]
        if not self.file_failed and not any(problem.key == option.key for problem in self.problems):
            self._wrong(option.key, f"must be given: {option.flag} host:port, or {option.variables[0]}")

    def _wrong(self, key: str, text: str, where: str | None = None) -> None:
        if where is None:
            where = self.given[key].origin if key in self.given else ""
        self.problems.append(Problem(key, where, text))

    # The layers

    def _layer_defaults(self) -> None:
        if named := self.environ.get(DEFAULTS_VARIABLE, ""):
            try:
                self._take_file(Path(named), _read(Path(named)))
            except SettingsError as error:
                self.problems += error.problems

    def _layer_file(self, directories: Sequence[Path]) -> None:
        named = self.flags.pop("config", "") or self.environ.get(CONFIG_VARIABLE, "")
        candidates = [[Path(named)]] if named else [[folder / name for name in FILE_NAMES] for folder in directories]
        for paths in candidates:
            try:
                # A file without any setting, as in a fresh checkout, is skipped.
                present = [path for path in paths if named or (_is_there(path) and not _is_bare(path))]
                files = [(path, content) for path in present if (content := _read(path)).data or named]
            except SettingsError as error:
                self.problems += error.problems
                self.file_failed = True
                return
            if len(files) > 1:
                self._wrong("", f"{files[1][0]} sets options too; keep one of the two files", str(files[0][0]))
            if files:
                self._take_file(files[0][0], files[0][1])
                return

    def _take_file(self, path: Path, content: FileContent) -> None:
        def where(key: str) -> str:
            line = content.lines.get(key)
            return f"{path}:{line}" if line else str(path)

        for section, body in content.data.items():
            if section in TABLES:
                if not isinstance(body, list):
                    what = "name and primary" if section == "route" else "url"
                    self._wrong(section, f"expected [[{section}]] tables, each with {what} = ...", where(section))
                    continue
                tables = {"backup": self.tables, "server": self.servers, "route": self.routes}[section]
                for n, table in enumerate(body):
                    label = f"{section}[{n}]"
                    tables.append((table, {f: where(f"{label}.{f}" if f else label) for f in ["", *_fields(table)]}))
            elif isinstance(body, dict) and section not in BY_KEY:
                for name, value in body.items():
                    self._take(f"{section}.{name}", value, where(f"{section}.{name}"))
                if not body and section not in SECTIONS:
                    self._unknown(section, [*SECTIONS, *TABLES], where(section))
            elif section in SECTIONS:
                self._wrong(section, "expected a section with options", where(section))
            else:
                self._take(section, body, where(section))

    def _take(self, key: str, value: Any, origin: str) -> None:
        if key not in BY_KEY:
            self._unknown(key, [*BY_KEY, *TABLES], origin)
        elif value is not None:
            self.given[key] = _Given(value, origin)

    def _unknown(self, name: str, known: Iterable[str], where: str, what: str = "option", within: str = "") -> None:
        names = list(known)
        meant = re.sub(r"(?i)(port|host|bind)$", "LISTEN" if name.isupper() else "listen", name)  # as elsewhere
        near = [meant] if meant in names else difflib.get_close_matches(name, names, 1)
        self._wrong(within + printable(name), f"unknown {what}" + (f"; did you mean {near[0]}?" if near else ""), where)

    def _layer_environment(self) -> None:
        ours = {name: option.key for option in OPTIONS for name in option.variables}
        set_by: dict[str, str] = {}
        for name, value in sorted(self.environ.items()):
            if not name.startswith(ENV_PREFIX) or name in _OURS or not value.strip():
                continue
            if name not in ours:
                if not _is_from_kubernetes(name, value):
                    self.strange_variables.append(name)
                continue
            key = ours[name]
            if key in set_by and self.environ[set_by[key]] != value:
                self._wrong(name, f"{set_by[key]} has another value; set only one of them", "environment")
            set_by[key] = name
            self._override(key, value, name)

    def _layer_flags(self) -> None:
        for key, value in self.flags.items():
            if of_backup := _OF_BACKUP.fullmatch(key):
                self.of_backups.setdefault(of_backup[1], {})[of_backup[2]] = value
            else:
                self._override(key, value, BY_KEY[key].flag)

    def _check_variables(self) -> None:
        """Report SMTP_DUP_ variables that are no option, except those that hold a password (env:NAME)."""
        given = [str(given.value) for given in self.given.values()] + [
            str(table) for table, _ in (*self.tables, *self.servers)
        ]
        passwords = {name for text in given for name in re.findall(r"\benv:(\w+)", text)}
        for name in self.strange_variables:
            if name not in passwords:
                known = [*(option.variables["__" in name] for option in OPTIONS), CONFIG_VARIABLE]
                self._unknown(name, known, "environment", "variable")

    def _override(self, key: str, value: str, origin: str) -> None:
        self.given[key] = _Given(value, origin)
        if key == "relay.destination_backups":
            self.tables.clear()  # a variable or a flag replaces all backups of the file

    # From what was given to values

    def _values(self) -> dict[str, Any]:
        """Return the value of every option; one that cannot be read is a problem and gets its default."""
        values: dict[str, Any] = {}
        for option in OPTIONS:
            if option.key in self.given:
                try:
                    values[option.key] = option.kind.read(self.given[option.key].value)
                except ValueError as error:
                    self._wrong(option.key, str(error))
            values.setdefault(option.key, option.kind.read(option.default))
        if values["state_dir"] is None:
            values["state_dir"] = default_state_dir(self.environ)
        if values["redis.sentinels"] and not values["redis.url"]:
            values["redis.url"] = "redis://"
        written = self.given.get("spool.dir", _Given(BY_KEY["spool.dir"].default, "")).value
        if isinstance(written, str) and written.startswith("<state_dir>"):
            values["spool.dir"] = Path(str(values["state_dir"]) + written.removeprefix("<state_dir>"))
        return values

    def _destinations(
        self, values: dict[str, Any]
    ) -> tuple[Destination | None, Destination | None, tuple[Destination, ...], tuple[Destination, ...]]:
        """Return the primary, the primary as it would be a backup, the backups, and the servers of [[server]]."""
        self.connections = values["workers.connections"]
        primary = self._primary(values)
        sender, soft_bounce = values["relay.demoted"]
        demoted = replace(primary, sender=sender, soft_bounce=soft_bounce) if primary else None
        backups: list[tuple[Destination, str, str]] = []  # with key and origin
        backups += self._plain_backups(values)
        for n, (table, where) in enumerate(self.tables, 1):
            backup = self._server_table("backup", n, table, where)
            if backup and primary and _is_the_same(table, backup, primary) and not self.demoted_table:
                demoted, self.demoted_table = backup, n
            elif backup:
                backups.append((backup, f"backup[{n}]", where[""]))
        for name, field in [(name, field) for name, given in self.of_backups.items() for field in given]:
            self._unknown(name, [b.name for b, _, _ in backups], BACKUP_FLAGS[field], "backup")
        count = len(backups)
        for n, (table, where) in enumerate(self.servers, 1):
            server = self._server_table("server", n, table, where)
            backups += [(server, f"server[{n}]", where[""])] if server else []
        backups += list(self._by_domain([*([primary] if primary else []), *(b for b, _, _ in backups)]))
        found = tuple(backup for backup, _, _ in backups)
        for index, text in conflicts(primary, found, own_addresses(values)):
            if index < 0:
                self._wrong("relay.destination_primary", text)
            else:
                self._wrong(backups[index][1], text, backups[index][2])
        return primary, demoted, found[:count], found[count:]

    def _by_domain(self, known: Sequence[Destination]) -> Iterator[tuple[Destination, str, str]]:
        """Yield the servers that only routes name, as mx:example.com, each with its key and origin."""
        names = {server.name.lower() for server in known}
        for n, (table, where) in enumerate(self.routes, 1):
            for field in ("primary", "servers", "backups") if isinstance(table, dict) else ():
                for text in filter(is_mx, _texts(table.get(field))):
                    if (name := default_name(text.strip())).lower() in names:
                        continue
                    names.add(name.lower())
                    server, _ = read_destination(text.strip(), {}, environ={}, connections=self.connections)
                    if server:  # else the route says what is wrong
                        yield server, f"route[{n}].{field}", where.get(field, where[""])

    def _plain_backups(self, values: dict[str, Any]) -> Iterator[tuple[Destination, str, str]]:
        """Yield the backups of relay.destination_backups, each with its key and origin."""
        key = "relay.destination_backups"
        for n, text in enumerate(values[key], 1):
            label = f"{key}[{n}]" if len(values[key]) > 1 else key
            named = _NAMED.fullmatch(text)
            fields = {"name": named[1]} if named else {}
            if backup := self._backup(label, named[2] if named else text, fields, {"": self.given[key].origin}):
                yield backup, label, self.given[key].origin

    def _routes(self, values: Mapping[str, Any], servers: Sequence[Destination]) -> tuple[Route, ...]:
        """Return the routes."""
        found: list[tuple[int, Route]] = []
        listening = own_addresses(values)
        by_name = {server.name: server for server in servers}
        known = [name for name, _, _ in ROUTE_FIELDS]
        for n, (table, where) in enumerate(self.routes, 1):
            label = f"route[{n}]"
            if not isinstance(table, dict):
                self._wrong(label, "expected a table with name = ... and primary = ...", where[""])
                continue
            for name in table:
                if name not in known:
                    self._unknown(name, known, where[name], "field of [[route]]", f"{label}.")
            route, faults = read_route(table, servers, listening, fold=values["routes.fold_local"])
            if route is not None:
                found.append((n, route))
                faults += lmtp_faults(route, by_name)
            for field, fault in faults:
                place = where.get(field) or where.get(field.partition(".")[0]) or where[""]
                self._wrong(f"{label}.{field}", fault, place)
        for index, text in hidden([route for _, route in found]):
            n = found[index][0]
            self._wrong(f"route[{n}]", text, self.routes[n - 1][1][""])
        return tuple(route for _, route in found)

    def _primary(self, values: dict[str, Any]) -> Destination | None:
        text = values["relay.destination_primary"]
        if not text:
            return None
        named = _NAMED.fullmatch(text)
        url, fields = (named[2], {"name": named[1]}) if named else (text, {})
        primary, faults = read_destination(url, fields, environ=self.environ, connections=self.connections)
        for _, fault in faults:
            self._wrong("relay.destination_primary", fault)
        if primary is None:
            return None
        most, age = values["relay.messages_per_connection"], values["relay.connection_age"]
        return replace(primary, messages_per_connection=most, connection_age=age)

    def _server_table(self, kind: str, number: int, table: Any, where: dict[str, str]) -> Destination | None:
        label = f"{kind}[{number}]"
        known = [field.key for field in BACKUP_FIELDS]
        if not isinstance(table, dict):
            self._wrong(label, "expected a table with url = ...", where[""])
            return None
        for name in table:
            if name not in known:
                self._unknown(name, known, where[name], f"field of [[{kind}]]", f"{label}.")
        rest = {name: value for name, value in table.items() if name in known and name != "url"}
        url = table.get("url")
        if not isinstance(url, str) or not url.strip():
            self._wrong(f"{label}.url", "expected host:port or a URL", where.get("url", where[""]))
            return None
        return self._backup(label, url.strip(), rest, where)

    def _backup(self, label: str, url: str, fields: Mapping[str, Any], where: Mapping[str, str]) -> Destination | None:
        """Read one backup with its flags, which refer to the name that it has without them."""
        connections = self.connections
        backup, faults = read_destination(url, fields, environ=self.environ, connections=connections)
        name = str(fields.get("name") or (backup.name if backup else url))
        if given := self.of_backups.pop(name, {}):
            where = {**where, **{field: BACKUP_FLAGS[field] for field in given}}
            fields = {**fields, **{field: value for field, value in given.items() if field != "url"}}
            url = given.get("url", url)
            backup, faults = read_destination(url, fields, environ=self.environ, connections=connections)
        for field, fault in faults:
            place = field or "url"
            is_apart = label.startswith(("backup[", "server[")) or place in where  # fields in a list have no place
            self._wrong(f"{label}.{place}" if is_apart else label, fault, where.get(place, where[""]))
        return backup


def _is_the_same(table: Any, backup: Destination, primary: Destination) -> bool:
    """Say whether a [[backup]] is meant to be the primary: by its name, which it has been given, and its address."""
    return "name" in table and backup.name == primary.name and same_server(backup, primary)


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, the names of a table, or the one text."""
    items = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else []
    return [item for item in items if isinstance(item, str)]


def _fields(table: Any) -> list[str]:
    """Return the fields of a table of a file, and those of a table within it."""
    if not isinstance(table, dict):
        return []
    inner = [f"{name}.{field}" for name, value in table.items() if isinstance(value, dict) for field in value]
    return [*table, *inner]


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return the default of state_dir."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.partition(":")[0]).absolute()  # systemd may list several
    if os.geteuid() == 0:
        return Path("/var/lib/smtp-dup")
    home = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or "/var/tmp", ".local/state")  # noqa: S108
    return Path(home, "smtp-dup").absolute()


def _is_from_kubernetes(name: str, value: str) -> bool:
    return bool(_KUBERNETES.fullmatch(name)) or (name.endswith("_PORT") and "://" in value)


# The file -----------------------------------------------------------------------------------------------------


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # no permission: reading the file will report it
        return True
    return True


def _is_bare(path: Path) -> bool:
    """Return whether a TOML file has only comments and headings of known sections, without loading dynaconf."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # reading it again will report it
        return False
    return path.suffix == ".toml" and all(_BARE_LINE.fullmatch(line) for line in lines)


def _read(path: Path) -> FileContent:
    from relay.config import file  # noqa: PLC0415  (dynaconf: 6 MB in every process, also without any file)

    try:
        return file.read(path)
    except file.UnreadableFile as error:
        raise SettingsError([Problem("", str(path), str(error))]) from None
