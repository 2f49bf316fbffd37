"""Who has moved, as one host goes by it: a copy of the map in Redis, in the state folder, for look-ups and a restart.

The copy is an SQLite file of one generation and a note beside it with what has changed since, both replaced by name: a
MovedMap that was loaded never changes. The first relay process of the host that hears of a generation writes it, under
a lock, and the others load that. What Redis has lost, or has an older or another one of, changes nothing. An entry that
makes no sense is taken as the copy has it. A state folder that cannot be written costs memory, and is told.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from relay import faultpoints, maillog, private_files
from relay.batches import batched
from relay.mail.ids import is_destination_name
from relay.mail.stored import any_text, parsed
from relay.mail.text import count as counted
from relay.mail.text import printable
from relay.routing import fixed_database
from relay.routing.fixed_database import IN_MEMORY, FixedDatabase, UnusableFile
from relay.topology import moving
from relay.topology.heartbeats import UNSAVED
from relay.topology.moved import Changes, MapState, MovedEntry, changes_of
from relay.topology.state import count

_FOLDER = "moved"
_NOTE = "map.json"
_LOCK = "moved.lock"
_MOST_CHANGES = 10_000  # beside the file, or a quarter of it
_LONGEST_NOTE = 64 << 20
_AGAIN = 5  # times that the map changes while it is read
_READ_AT_ONCE = 500
_COLUMNS = ("key TEXT PRIMARY KEY", "server TEXT", "at REAL", "by TEXT", "note TEXT")


@dataclass(frozen=True, slots=True)
class MovedMap:
    """The map of one generation. ``servers`` says how many entries name each; ``fault`` what was damaged in Redis."""

    state: MapState = field(default_factory=MapState)
    servers: Mapping[str, int] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)  # since the file
    base: str = ""  # the file's name, "" for none
    base_size: int = 0
    rows: Mapping[str, str] | None = None  # of the file, key -> server, where these are in memory
    database: FixedDatabase | None = None
    fault: str = ""

    def __len__(self) -> int:
        return self.state.count

    def find(self, wanted: Sequence[str]) -> tuple[str, str] | None:
        """Return the first of these keys that has an entry, and the server that it names. Raises OSError."""
        rows = self.rows
        if rows is None:
            rows = {key: entry.server for key, entry in self._stored(wanted)}
        changes = self.changes
        for key in wanted:
            if key in changes:
                if (entry := changes[key]) is not None:
                    return key, entry.server
            elif (server := rows.get(key)) is not None:
                return key, server
        return None

    def entries(self, wanted: Iterable[str]) -> dict[str, MovedEntry]:
        """Return the entries with these keys, as far as there are such. Raises OSError."""
        every = list(wanted)
        found = {key: entry for key in every if (entry := self.changes.get(key)) is not None}
        for some in batched([key for key in every if key not in self.changes], _READ_AT_ONCE):
            found |= dict(self._stored(some))
        return found

    def everything(self) -> Iterator[tuple[str, MovedEntry]]:
        """Yield all entries, by key. Raises OSError."""
        if self.database is not None:
            for key, *rest in self.database.rows("SELECT key, server, at, by, note FROM rows ORDER BY key"):
                if key not in self.changes:
                    yield key, MovedEntry(*rest)
        for key, entry in sorted(self.changes.items()):
            if entry is not None:
                yield key, entry

    def _stored(self, wanted: Sequence[str]) -> Iterator[tuple[str, MovedEntry]]:
        for key, *rest in self.database.find("server, at, by, note", wanted) if self.database else ():
            yield key, MovedEntry(*rest)


NOBODY = MovedMap()


def load(state_dir: Path, held: MovedMap = NOBODY) -> MovedMap:
    """Return the copy of this host, NOBODY where there is none. Raises OSError where that cannot be used."""
    folder = state_dir.absolute() / _FOLDER
    try:
        data = private_files.read(folder, _NOTE, _LONGEST_NOTE)
    except FileNotFoundError:
        return NOBODY
    try:
        found = parsed(data)
        state = MapState.of(found["state"])
        if (state.generation, state.id) == (held.state.generation, held.state.id):
            return held
        base = Path(any_text(found["base"])).name
        servers = {name: count(number) for name, number in found["servers"].items() if is_destination_name(name)}
        size = count(found["base_size"])
        rows, database = (None, None)
        if base:
            rows, database = (held.rows, held.database) if base == held.base else _opened(folder / base, size)
        fault = any_text(found["fault"])
        return MovedMap(state, servers, changes_of(found["changes"]), base, size, rows, database, fault)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableFile(f"{folder / _NOTE}: {printable(str(error))}") from error


def load_or_tell(state_dir: Path) -> MovedMap:
    """Return the copy of this host; one that cannot be used is none, and is told."""
    try:
        with contextlib.suppress(UnusableFile):  # it may just be replaced
            return load(state_dir)
        return load(state_dir)
    except OSError as error:
        maillog.notice("error", "the copy of who has moved cannot be used", reason=str(error))
        return NOBODY


def follow(connection: Any, state_dir: Path, held: MovedMap) -> tuple[MovedMap, str]:
    """Return the map to go by from now on, and why that is not the one in Redis, "" where it is. Raises RedisError."""
    try:
        folder = _folder(state_dir)
        with private_files.locked(folder / _LOCK):
            disk = None
            with contextlib.suppress(OSError):  # else it is written anew
                disk = load(state_dir, held)
            before = disk if disk and disk.state.generation > held.state.generation else held
            try:
                made, trouble = _follow(connection, folder, before)
                if made is held and made.state.generation and (disk is None or disk.state != made.state):
                    made = _kept(folder, made)  # it could not be written when it was new, or has been lost
            except OSError:
                if disk is not None:
                    _remove_others(folder, disk.base)
                raise
            return made, trouble
    except OSError as error:
        made, trouble = _follow(connection, None, held)
        return (
            made,
            trouble or f"{UNSAVED}: {printable(error.strerror or str(error))}",
        )


def _follow(connection: Any, folder: Path | None, held: MovedMap) -> tuple[MovedMap, str]:
    found, nonsense = moving.state(connection)
    if trouble := moving.objection(held.state, found, nonsense):
        return held, trouble
    if found is None or (found.generation, found.id) == (held.state.generation, held.state.id):
        return held, held.fault
    try:
        steps = moving.steps(connection, held.state, found)
    except moving.Forked:
        text = moving.objection(held.state, MapState(held.state.generation, "another"), "")
        return held, text
    if steps is not None:
        changes: dict[str, MovedEntry | None] = {}
        for step in steps:
            changes |= step.changes
        made = _changed(held, found, changes)
        if sum(made.servers.values()) == found.count:
            return _kept(folder, made), made.fault
    return _whole(connection, folder, held)


def _changed(held: MovedMap, state: MapState, changes: Changes) -> MovedMap:
    servers = Counter(held.servers)
    servers.subtract(entry.server for entry in held.entries(changes).values())
    servers.update(entry.server for entry in changes.values() if entry is not None)
    # An entry that is not in the file needs no mark that it is gone.
    merged = {**held.changes, **changes}
    return MovedMap(state, +servers, merged, held.base, held.base_size, held.rows, held.database)


def _kept(folder: Path | None, made: MovedMap) -> MovedMap:
    """Put a map on disk; what has changed becomes a new file where it is much."""
    if folder is None:
        return made
    is_lost = bool(made.base) and not (folder / made.base).exists()
    if is_lost or len(made.changes) > max(_MOST_CHANGES, made.base_size // 4):
        made = replace(_stored(folder, made.state, made.everything()), fault=made.fault)
    _write_note(folder, made)
    return made


def _whole(connection: Any, folder: Path | None, held: MovedMap) -> tuple[MovedMap, str]:
    """Read all of the map, as it was at one moment."""
    for _ in range(_AGAIN):
        found, nonsense = moving.state(connection)
        if trouble := moving.objection(held.state, found, nonsense):
            return held, trouble
        if found is None:
            break
        reading = _Reading(connection, held)
        if folder is None:
            rows = dict(reading)
            made = MovedMap(found, Counter(entry.server for entry in rows.values()), rows)
        else:
            made = _stored(folder, found, reading)
        if moving.state(connection)[0] != found:
            continue
        size = sum(made.servers.values()) + reading.missing
        fault = reading.fault(size, found)
        if size != found.count and held.state.generation:
            return held, fault
        made = replace(made, fault=fault)
        if folder is not None:
            _write_note(folder, made)
        return made, fault
    return held, "who has moved changes all the time in Redis: it is read again"


class _Reading:
    """All entries that Redis has; of those that make no sense the ones that are held."""

    def __init__(self, connection: Any, held: MovedMap) -> None:
        self._connection = connection
        self._held = held
        self._damaged: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, MovedEntry]]:
        for found, damaged in moving.pages(self._connection):
            self._damaged |= damaged
            yield from found.items()
            yield from self._held.entries(damaged).items()

    @property
    def missing(self) -> int:
        """The number of those that make no sense and are not held."""
        return len(self._damaged.keys() - self._held.entries(self._damaged).keys())

    def fault(self, size: int, state: MapState) -> str:
        """Say what is wrong with what was read, "" where nothing is."""
        texts = []
        if self._damaged:
            key, why = min(self._damaged.items())
            entries = counted(len(self._damaged), "entry", "entries")
            texts.append(
                f"{entries} of who has moved in Redis without sense, {printable(key)[:80]}: {why}; move it again"
            )
        if size != state.count:
            text = f"Redis holds {counted(size, 'entry', 'entries')} of who has moved, and should hold {state.count}"
            texts.append(f"{text}; `smtp-dup move --repair` puts them back")
        return "; ".join(texts)


# On disk ----------------------------------------------------------------------------------------------------------


def _folder(state_dir: Path) -> Path:
    folder = state_dir.absolute() / _FOLDER
    private_files.folder(folder)
    return folder


def _stored(folder: Path, state: MapState, entries: Iterable[tuple[str, MovedEntry]]) -> MovedMap:
    """Write all entries into a file of their own; the note of it comes later."""
    name = f"{state.generation}-{secrets.token_hex(4)}.db"
    fixed_database.write(folder, name, _COLUMNS, ((key, *entry) for key, entry in entries))
    counts = FixedDatabase(folder / name).rows("SELECT server, count(*) FROM rows GROUP BY server")
    servers: dict[str, int] = dict(counts)
    size = sum(servers.values())
    return MovedMap(state, servers, {}, name, size, *_opened(folder / name, size))


def _opened(path: Path, size: int) -> tuple[dict[str, str] | None, FixedDatabase]:
    database = FixedDatabase(path)
    if size > IN_MEMORY:
        database.check()
        return None, database
    names: dict[str, str] = {}  # one text for all entries of a server
    found = {key: names.setdefault(server, server) for key, server in database.rows("SELECT key, server FROM rows")}
    if len(found) != size:
        entries = counted(len(found), "entry", "entries")
        raise UnusableFile(f"{path}: it holds {entries}, and should hold {size}")
    return found, database


def _write_note(folder: Path, made: MovedMap) -> None:
    words = {
        "state": asdict(made.state),
        "servers": dict(made.servers),
        "base": made.base,
        "base_size": made.base_size,
        "changes": made.changes,
        "fault": made.fault,
    }
    faultpoints.reach("map written")
    private_files.write(folder, _NOTE, json.dumps(words).encode())
    _remove_others(folder, made.base)


def _remove_others(folder: Path, base: str) -> None:
    """Remove all files but the one that the note names; whoever has another one open can read it on."""
    for path in folder.glob("*.db"):
        if path.name != base:
            with contextlib.suppress(OSError):
                path.unlink()
