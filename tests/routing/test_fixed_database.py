"""A snapshot's file is closed with the last one that has it, and readable until then."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from relay.routing.fixed_database import FixedDatabase, UnusableFile


def test_closed_with_the_last_one_that_has_it(tmp_path: Path) -> None:
    """Two snapshots share a file; it can be read when it has been removed, and is closed when both have gone."""
    path = tmp_path / "a ?#%.db"
    with contextlib.closing(sqlite3.connect(path)) as made, made:
        made.execute("CREATE TABLE rows (key TEXT)")
        made.execute("INSERT INTO rows VALUES ('anna@example.com')")
    one: list[FixedDatabase] = [FixedDatabase(path)]
    two = list(one)
    path.unlink()
    connection = one[0]._connection
    one.clear()
    assert list(two[0].rows("SELECT key FROM rows WHERE key = ?", ("anna@example.com",)))
    two.clear()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """A file that is missing or none of SQLite's cannot be used, and leaves nothing open."""
    with pytest.raises(UnusableFile, match="missing"):
        FixedDatabase(tmp_path / "missing.db")
    (tmp_path / "other.db").write_bytes(b"no database" * 100)
    with pytest.raises(UnusableFile, match="a table: file is not a database"):
        FixedDatabase(tmp_path / "other.db", "a table").check()
