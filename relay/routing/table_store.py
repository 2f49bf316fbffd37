"""Tables as all processes of a host use them: read once by one process, kept in ``state_dir/tables``, changed by name.

``update`` reads a table's file again where it has changed. What can be used becomes an SQLite file named by its digest,
and a note beside it says which of these holds: every process loads that one when it sees another note.
A file with a fault is refused whole, and so is one that is empty now and had more than 100 keys: the former stays, and
the note says why. Up to 100,000 keys are kept in memory by each process, more are looked up in the file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from relay import private_files
from relay.mail.destination import Destination
from relay.mail.stored import parsed, texts
from relay.mail.text import count, printable
from relay.routing import fixed_database
from relay.routing.fixed_database import IN_MEMORY, FixedDatabase
from relay.routing.table_file import BadTable, Row, parse

_FOLDER = "tables"
_LOCK = "tables.lock"
_TOO_MANY_TO_LOSE = 100  # keys; a failed export is commoner than a company without people
_LONGEST_NOTE = 64 << 10
_LARGEST = 1 << 30  # octets of a table's file
_VERSION = 1  # of what is in the SQLite file
_COLUMNS = ("key TEXT PRIMARY KEY", "servers TEXT", "line INTEGER")
_LATE_SECONDS = 15.0  # after which a file that has changed should have been looked at


_Stamp = tuple[int, int, int, int]  # of a file: time of change in ns, size, inode, time of change of the inode


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of one table: the file that it was read from, and the SQLite file that holds, "" for none."""

    source: str
    stamp: _Stamp  # of the file when it was looked at last
    context: str  # what its values were compared with
    name: str = ""
    keys: int = 0
    servers: tuple[str, ...] = ()  # whom its entries name
    changed: float = 0.0  # time of change of the file that holds, seconds since the epoch
    fault: str = ""  # why a later file is refused


class _Unusable(ValueError):
    """A note that makes no sense."""


def update(
    state_dir: Path, source: Path, servers: Sequence[Destination], *, fold: bool, allow_empty: bool = False
) -> Note:
    """Read a table's file if it has changed. Raises BadTable: it is refused, and the former stays if there is one."""
    folder = _folder(state_dir)
    context = _context(servers, fold=fold)
    with private_files.locked(folder / _LOCK):
        known = note(state_dir, source)
        try:
            stamp = _stamp(source)
        except OSError as error:
            raise _refuse(folder, known or Note(str(source), (0, 0, 0, 0), context), [_words(error)]) from None
        holds = known if known is not None and known.context == context else None
        if holds and holds.stamp == stamp and (folder / holds.name).is_file() and not (allow_empty and holds.fault):
            if holds.fault:
                raise BadTable([holds.fault])
            return holds
        before = known or Note(str(source), stamp, context)
        looked = replace(before, stamp=stamp, context=context if not before.name else before.context)
        try:
            rows, digest = _read(source, servers, context, fold=fold)
        except BadTable as error:
            raise _refuse(folder, looked, error.faults) from None
        if not rows and before.keys > _TOO_MANY_TO_LOSE and not allow_empty:
            text = f"it is empty, and had {count(before.keys, 'key')}: if that is right, smtp-dup reload --allow-empty"
            raise _refuse(folder, looked, [text])
        name = f"{digest}.db"
        if not (folder / name).is_file():
            sorted_rows = ((key, ",".join(row.servers), row.line) for key, row in sorted(rows.items()))
            fixed_database.write(folder, name, _COLUMNS, sorted_rows, "WITHOUT ROWID")
        made = Note(str(source), stamp, context, name, len(rows), _named(rows), stamp[0] / 1e9)
        _save(folder, made)
        _clean(folder, {name, before.name})
        return made


def read(source: Path, servers: Sequence[Destination], *, fold: bool) -> Table:
    """Return a table as its file is now, for a command: nothing is stored. Raises BadTable."""
    try:
        stamp = _stamp(source)
    except OSError as error:
        raise BadTable([_words(error)]) from None
    rows, _ = _read(source, servers, "", fold=fold)
    made = Note(str(source), stamp, "", "", len(rows), _named(rows), stamp[0] / 1e9)
    lines = {key: row.line for key, row in rows.items()}
    return Table(made, stamp, source, {key: row.servers for key, row in rows.items()}, None, lines)


def note(state_dir: Path, source: Path) -> Note | None:
    """Return what is known of a table, None for nothing that makes sense."""
    try:
        data = private_files.read(_path_of(state_dir), _note_name(source), _LONGEST_NOTE)
        found = parsed(data)
        made = Note(**{**found, "stamp": tuple(map(int, found["stamp"])), "servers": texts(found["servers"])})
        if made.source != str(source) or (made.name and Path(made.name).name != made.name):
            raise _Unusable
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return made


def standing(state_dir: Path, source: Path) -> Note | None:
    """Return what is known of a table that is in use; its fault says why the file as it is now does not count.

    What cannot be noted there, on a disk that is full or read-only, is seen by the file: it has changed, and has not
    been looked at since.
    """
    found = note(state_dir, source)
    if found is None or found.fault:
        return found
    try:
        stamp = _stamp(source)
    except OSError as error:
        return replace(found, fault=_words(error))
    if stamp == found.stamp or abs(time.time() - max(stamp[0], stamp[3]) / 1e9) < _LATE_SECONDS:
        return found
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp[0] / 1e9))
    return replace(found, fault=f"of {changed}, and not taken since: {_path_of(state_dir)} must be writable")


def _path_of(state_dir: Path) -> Path:
    return state_dir.absolute() / _FOLDER


def _folder(state_dir: Path) -> Path:
    folder = _path_of(state_dir)
    private_files.folder(folder)
    return folder


def _note_name(source: Path) -> str:
    return hashlib.sha256(str(source).encode("utf-8", "surrogateescape")).hexdigest()[:24] + ".json"


def _context(servers: Sequence[Destination], *, fold: bool) -> str:
    """Return a digest of what a table's values and keys mean."""
    words = json.dumps([_VERSION, fold, [[s.name, s.host, s.port] for s in servers]])
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _stamp(source: Path) -> _Stamp:
    found = source.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns


def _read(source: Path, servers: Sequence[Destination], context: str, *, fold: bool) -> tuple[dict[str, Row], str]:
    try:
        with source.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise BadTable([_words(error)]) from None
    if len(data) > _LARGEST:
        raise BadTable([f"it is larger than {_LARGEST >> 20} MB"])
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadTable([f"line {data.count(10, 0, error.start) + 1}: no UTF-8"]) from None
    return parse(text, servers, fold=fold), hashlib.sha256(context.encode() + data).hexdigest()[:24]


def _named(rows: Mapping[str, Row]) -> tuple[str, ...]:
    return tuple(sorted({name for row in rows.values() for name in row.servers}))


def _words(error: OSError) -> str:
    return f"it cannot be read: {error.strerror or type(error).__name__}"


def _refuse(folder: Path, known: Note, faults: Sequence[str]) -> BadTable:
    """Note why a file is refused; the former stays."""
    if known.name:
        with contextlib.suppress(OSError):
            _save(folder, replace(known, fault=printable("; ".join(faults))[:500]))
    return BadTable(faults)


def _save(folder: Path, made: Note) -> None:
    private_files.write(folder, _note_name(Path(made.source)), json.dumps(asdict(made)).encode())


def _clean(folder: Path, kept: set[str]) -> None:
    """Remove what no note names; what is held open stays readable for whoever has it."""
    named = set(kept)
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            named.add(parsed(path.read_bytes())["name"])
    for path in folder.glob("*.db"):
        if path.name not in named:
            with contextlib.suppress(OSError):
                path.unlink()


class Table:
    """One table as it was loaded: a snapshot, in which addresses are looked up."""

    def __init__(
        self,
        held: Note,
        stamp: _Stamp,
        path: Path,
        rows: dict[str, tuple[str, ...]] | None,
        database: FixedDatabase | None,
        lines: Mapping[str, int] | None = None,
    ) -> None:
        self.note = held
        self.stamp = stamp  # of the note
        self._path = path
        self._rows = rows
        self._database = database
        self._lines = lines

    @classmethod
    def load(cls, state_dir: Path, source: Path) -> Table:
        """Return the table that holds now. Raises OSError."""
        folder = _path_of(state_dir)
        stamp = _stamp(folder / _note_name(source))
        found = note(state_dir, source)
        if found is None or not found.name:
            raise OSError(f"{source}: it has not been read")
        path = folder / found.name
        database = FixedDatabase(path, str(source))
        if found.keys > IN_MEMORY:
            database.check()
            return cls(found, stamp, path, None, database)
        with contextlib.closing(database):
            rows = {key: _names(servers) for key, servers in database.rows("SELECT key, servers FROM rows")}
        return cls(found, stamp, path, rows, None)

    def is_stale(self, state_dir: Path) -> bool:
        """Return whether another note has been written since."""
        try:
            return _stamp(_path_of(state_dir) / _note_name(Path(self.note.source))) != self.stamp
        except OSError:
            return False

    def find(self, keys: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
        """Return the first of these keys that is there, and the servers that its entry names. Raises OSError."""
        rows = self._rows
        if rows is None:
            found_rows = self._database.find("servers", keys) if self._database else ()
            rows = {key: _names(servers) for key, servers in found_rows}
        for key in keys:
            if (found := rows.get(key)) is not None:
                return key, found
        return None

    def line_of(self, key: str) -> int:
        """Return in which line of the file an entry stands. Raises OSError."""
        if self._lines is not None:
            return self._lines.get(key, 0)
        with contextlib.closing(FixedDatabase(self._path, self.note.source)) as database:
            return next((int(line) for _, line in database.find("line", (key,))), 0)


@functools.lru_cache(maxsize=1024)
def _names(servers: str) -> tuple[str, ...]:
    return tuple(servers.split(",")) if servers else ()
