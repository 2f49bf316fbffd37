"""What was given, layer over layer: a file of defaults, a file, SMTP_DUP_* variables, flags; the later one wins.

Nothing is read as a value here, only taken with its place (file and line, variable or flag). What is no option is a
problem, with what was perhaps meant; taking goes on behind it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from relay.config.model import Layers
from relay.config.options import BY_KEY, ENV_PREFIX, OPTIONS, SECTIONS, TABLES
from relay.config.problems import Problem, SettingsError
from relay.mail.text import printable

if TYPE_CHECKING:
    from relay.config.file import FileContent

FILE_NAMES = ("settings.toml", "config.yaml")
CONFIG_VARIABLE = ENV_PREFIX + "CONFIG"
DEFAULTS_VARIABLE = ENV_PREFIX + "DEFAULTS"  # a file of defaults (container image); other files override it
_OURS = (CONFIG_VARIABLE, DEFAULTS_VARIABLE)
# Kubernetes sets these in every container if there is a service named smtp-dup...; they are no settings.
_KUBERNETES = re.compile(r"SMTP_DUP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
# A field of one backup given by a flag; a backup with its name in front (a host has no "=").
_OF_BACKUP = re.compile(r"backup\[(.*)\]\.(\w+)")
_BARE_LINE = re.compile(rf"\s*(\[({'|'.join(SECTIONS)})\]\s*)?(#.*)?")


class GivenValue(NamedTuple):
    """A value as it was given, and where."""

    value: Any
    origin: str


class GivenSettings:
    """The values given so far, and the problems met so far."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ
        self.given: dict[str, GivenValue] = {}
        self.tables: list[tuple[Any, Mapping[str, str]]] = []  # [[backup]]: its fields, and the place of each
        self.of_backups: dict[str, dict[str, str]] = {}  # name -> fields that flags give
        self.servers: list[tuple[Any, Mapping[str, str]]] = []  # [[server]]
        self.routes: list[tuple[Any, Mapping[str, str]]] = []  # [[route]]
        self.problems: list[Problem] = []
        self.file_failed = False  # what seems to be missing may stand there
        self._strange_variables: list[str] = []

    @classmethod
    def of(cls, layers: Layers, environ: Mapping[str, str]) -> GivenSettings:
        """Return what was given elsewhere."""
        made = cls(environ)
        made.given = {key: GivenValue(*given) for key, given in layers.given.items() if key in BY_KEY}
        made.tables = list(layers.tables)
        made.of_backups = {name: dict(fields) for name, fields in layers.of_backups.items()}
        made.servers, made.routes = list(layers.servers), list(layers.routes)
        return made

    @property
    def layers(self) -> Layers:
        of_backups = {name: dict(fields) for name, fields in self.of_backups.items()}
        return Layers(dict(self.given), list(self.tables), of_backups, list(self.servers), list(self.routes))

    def take(self, flags: Mapping[str, str], directories: Sequence[Path]) -> None:
        """Take what is given; the key "config" of the flags names the only file to read."""
        self._defaults()
        self._file(flags.get("config", "") or self.environ.get(CONFIG_VARIABLE, ""), directories)
        self._environment()
        self._flags(flags)
        self._check_variables()

    def keep(self, running: Layers) -> None:
        """Have what takes a restart as it runs."""
        for option in OPTIONS:
            if option.takes_restart:
                self.given.pop(option.key, None)
                if option.key in running.given:
                    self.given[option.key] = GivenValue(*running.given[option.key])

    def wrong(self, key: str, text: str, where: str | None = None) -> None:
        """Note a problem with a key; where that was given, unless ``where`` says so."""
        if where is None:
            where = self.given[key].origin if key in self.given else ""
        self.problems.append(Problem(key, where, text))

    def unknown(self, name: str, known: Iterable[str], where: str, what: str = "option", within: str = "") -> None:
        """Note a name that is none of those known."""
        names = list(known)
        meant = re.sub(r"(?i)(port|host|bind)$", "LISTEN" if name.isupper() else "listen", name)  # as elsewhere
        near = [meant] if meant in names else difflib.get_close_matches(name, names, 1)
        self.wrong(within + printable(name), f"unknown {what}" + (f"; did you mean {near[0]}?" if near else ""), where)

    def _defaults(self) -> None:
        if named := self.environ.get(DEFAULTS_VARIABLE, ""):
            try:
                self._take_file(Path(named), _read(Path(named)))
            except SettingsError as error:
                self.problems += error.problems

    def _file(self, named: str, directories: Sequence[Path]) -> None:
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
                self.wrong("", f"{files[1][0]} sets options too; keep one of the two files", str(files[0][0]))
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
                    self.wrong(section, f"expected [[{section}]] tables, each with {what} = ...", where(section))
                    continue
                tables = {"backup": self.tables, "server": self.servers, "route": self.routes}[section]
                for n, table in enumerate(body):
                    label = f"{section}[{n}]"
                    tables.append((table, {f: where(f"{label}.{f}" if f else label) for f in ["", *_fields(table)]}))
            elif isinstance(body, dict) and section not in BY_KEY:
                for name, value in body.items():
                    self._take(f"{section}.{name}", value, where(f"{section}.{name}"))
                if not body and section not in SECTIONS:
                    self.unknown(section, [*SECTIONS, *TABLES], where(section))
            elif section in SECTIONS:
                self.wrong(section, "expected a section with options", where(section))
            else:
                self._take(section, body, where(section))

    def _take(self, key: str, value: Any, origin: str) -> None:
        if key not in BY_KEY:
            self.unknown(key, [*BY_KEY, *TABLES], origin)
        elif value is not None:
            self.given[key] = GivenValue(value, origin)

    def _environment(self) -> None:
        ours = {name: option.key for option in OPTIONS for name in option.variables}
        set_by: dict[str, str] = {}
        for name, value in sorted(self.environ.items()):
            if not name.startswith(ENV_PREFIX) or name in _OURS or not value.strip():
                continue
            if name not in ours:
                if not _is_from_kubernetes(name, value):
                    self._strange_variables.append(name)
                continue
            key = ours[name]
            if key in set_by and self.environ[set_by[key]] != value:
                self.wrong(name, f"{set_by[key]} has another value; set only one of them", "environment")
            set_by[key] = name
            self._override(key, value, name)

    def _flags(self, flags: Mapping[str, str]) -> None:
        for key, value in flags.items():
            if of_backup := _OF_BACKUP.fullmatch(key):
                self.of_backups.setdefault(of_backup[1], {})[of_backup[2]] = value
            elif key != "config":
                self._override(key, value, BY_KEY[key].flag)

    def _check_variables(self) -> None:
        """Report SMTP_DUP_ variables that are no option, except those that hold a password (env:NAME)."""
        given = [*(value.value for value in self.given.values()), *self.tables, *self.servers, self.of_backups]
        passwords = set(re.findall(r"\benv:(\w+)", str(given)))
        for name in self._strange_variables:
            if name not in passwords:
                known = [*(option.variables["__" in name] for option in OPTIONS), CONFIG_VARIABLE]
                self.unknown(name, known, "environment", "variable")

    def _override(self, key: str, value: str, origin: str) -> None:
        self.given[key] = GivenValue(value, origin)
        if key == "relay.destination_backups":
            self.tables.clear()  # a variable or a flag replaces all backups of the file


def _fields(table: Any) -> list[str]:
    """Return the fields of a table of a file, and those of a table within it."""
    if not isinstance(table, dict):
        return []
    inner = [f"{name}.{field}" for name, value in table.items() if isinstance(value, dict) for field in value]
    return [*table, *inner]


def _is_from_kubernetes(name: str, value: str) -> bool:
    return bool(_KUBERNETES.fullmatch(name)) or (name.endswith("_PORT") and "://" in value)


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
