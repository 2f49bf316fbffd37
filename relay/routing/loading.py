"""The routes of the settings with their tables: read anew by one process of a host, loaded by every relay process.

A table that cannot be used any more stays as it was; whoever looks at its note, or at the log, sees why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from relay import maillog
from relay.config.model import Settings
from relay.routing import table_store
from relay.routing.decisions import Router
from relay.routing.moved_copy import NOBODY, MovedMap
from relay.routing.table_file import BadTable
from relay.routing.table_store import Note, Table

LOOK_SECONDS = 5.0


def sources(settings: Settings) -> list[Path]:
    """Return the files of all tables that routes name, each once."""
    return list(dict.fromkeys(path for route in settings.route_table for path in route.files))


def update_all(settings: Settings, *, allow_empty: bool = False) -> Iterator[tuple[Path, Note | None, list[str]]]:
    """Read every table whose file has changed; yields the file, what holds now if anything does, and its faults."""
    for source in sources(settings):
        try:
            held = table_store.update(
                settings.state_dir, source, settings.named, fold=settings.routes.fold_local, allow_empty=allow_empty
            )
        except BadTable as error:
            known = table_store.note(settings.state_dir, source)
            yield source, known if known and known.name else None, error.faults
        except OSError as error:
            known = table_store.note(settings.state_dir, source)
            yield source, known if known and known.name else None, [f"{settings.state_dir}: {error.strerror or error}"]
        else:
            yield source, held, []


def faults(settings: Settings, *, allow_empty: bool = False, only_without_former: bool = False) -> list[str]:
    """Read every table; returns a line for each fault, "/etc/smtp-dup/moved: line 3: ...".

    ``only_without_former`` leaves out, and logs, those of tables whose former content goes on to hold.
    """
    found = []
    for source, held, lines in update_all(settings, allow_empty=allow_empty):
        if held is not None and lines and only_without_former:
            maillog.table_refused(str(source), "; ".join(lines))
            continue
        found += [f"{source}: {line}" for line in lines]
    return found


def keep_updating(settings: Settings, stop: threading.Event) -> None:
    """Read tables that have changed, until ``stop``: the housekeeping's duty."""
    told: dict[Path, tuple[str, str]] = {}
    while not stop.wait(LOOK_SECONDS):
        for source, held, lines in update_all(settings):
            state = (held.name if held else "", "; ".join(lines))
            before = told.get(source)
            told[source] = state
            if lines and (before is None or before[1] != state[1]):
                maillog.table_refused(str(source), state[1])
            elif held is not None and before is not None and before != state and not lines:
                maillog.table_read(str(source), held.keys)


class Tables:
    """The tables of a relay process, and the router that goes by them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tables: dict[Path, Table] = {}

    def load(self) -> None:
        """Load the tables that hold now. Raises OSError."""
        state_dir = self._settings.state_dir
        self._tables = {source: Table.load(state_dir, source) for source in sources(self._settings)}

    def refresh(self) -> bool:
        """Load tables that have changed; returns whether one has. Raises OSError, and nothing has changed then."""
        state_dir = self._settings.state_dir
        stale = [source for source, table in self._tables.items() if table.is_stale(state_dir)]
        self._tables |= {source: Table.load(state_dir, source) for source in stale}
        return bool(stale)

    def router(self, moved: MovedMap = NOBODY) -> Router:
        """Return the routes with these tables, and with who has moved."""
        return router_of(self._settings, self._tables, moved)


def router_of(settings: Settings, tables: Mapping[Path, Table], moved: MovedMap = NOBODY) -> Router:
    """Return the routes of the settings with these tables, and with who has moved."""
    names = [server.name for server in settings.named]
    routes = settings.routes
    return Router(settings.route_table, tables, names, fold=routes.fold_local, moved=moved, split=routes.split)


def tables_as_they_are(settings: Settings, tell: Callable[[str], None]) -> dict[Path, Table]:
    """Return the tables for a command: as what runs has them, else as their files are now. Raises BadTable.

    ``tell`` gets a line for each file that is refused by what runs.
    """
    found: dict[Path, Table] = {}
    for source in sources(settings):
        held = table_store.standing(settings.state_dir, source)
        if held is not None and held.name:
            try:
                found[source] = Table.load(settings.state_dir, source)
            except OSError:
                held = None
            else:
                if held.fault:
                    tell(f"{source}: as it is now it is refused, what was read before holds: {held.fault}")
        if source not in found:
            found[source] = table_store.read(source, settings.named, fold=settings.routes.fold_local)
    return found
