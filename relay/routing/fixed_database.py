"""An SQLite file that is never changed once it has its name: a table of rows, each with a key, to be looked up in.

Snapshots share it, and none of them knows who is the last: it is closed when nobody has it any more. The file may be
removed before that. What cannot be read or written raises UnusableFile.
"""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from relay import private_files

IN_MEMORY = 100_000  # rows: up to so many are kept in memory by whoever looks them up


class UnusableFile(OSError):
    """A file that cannot be used."""


def write(folder: Path, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], options: str = "") -> None:
    """Write rows, of which the last with a key counts, into a file of that name. Raises OSError.

    ``columns`` and ``options`` are SQL, as in CREATE TABLE.
    """
    marks = ", ".join("?" * len(columns))
    try:
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
            database.execute(f"CREATE TABLE rows ({', '.join(columns)}) {options}")
            database.execute("BEGIN")
            database.executemany(f"INSERT OR REPLACE INTO rows VALUES ({marks})", rows)  # noqa: S608 - nothing but marks
            database.execute("COMMIT")
            private_files.write(folder, name, database.serialize())
    except sqlite3.Error as error:
        raise UnusableFile(f"{folder / name} cannot be written: {error}") from error


class FixedDatabase:
    """The open file; ``what`` names it in errors."""

    __slots__ = ("__weakref__", "_connection", "_what", "close")

    def __init__(self, path: Path, what: str = "") -> None:
        self._what = what or str(path)
        # Only what is immutable can be opened without a lock, also in a folder that cannot be written.
        uri = f"{path.as_uri()}?mode=ro&immutable=1"
        try:
            self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        except sqlite3.Error as error:
            raise UnusableFile(f"{self._what}: {error}") from error
        self.close = weakref.finalize(self, self._connection.close)  # at the end of the process, too

    def rows(self, query: str, values: Sequence[str] = ()) -> Iterator[Any]:
        """Yield what a query finds."""
        try:
            yield from self._connection.execute(query, values)
        except sqlite3.Error as error:
            raise UnusableFile(f"{self._what}: {error}") from error

    def find(self, columns: str, keys: Sequence[str]) -> Iterator[Any]:
        """Yield key and columns of the rows with one of these keys."""
        # Octets that are no UTF-8 are in no file.
        asked = [key for key in keys if key.isascii() or key == key.encode("utf-8", "replace").decode()]
        marks = ",".join("?" * len(asked))
        return self.rows(f"SELECT key, {columns} FROM rows WHERE key IN ({marks})", asked)  # noqa: S608 - as above

    def check(self) -> None:
        """See that rows can be read."""
        next(self.rows("SELECT 1 FROM rows LIMIT 1"), None)
