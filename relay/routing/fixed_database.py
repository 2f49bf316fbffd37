"""An SQLite file that is never changed once it has its name, opened to be looked up in. Raises sqlite3.Error.

Snapshots share it, and none of them knows who is the last: it is closed when nobody has it any more. The file may be
removed before that.
"""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Sequence
from pathlib import Path


class FixedDatabase:
    """The open file; to be kept for as long as rows are read from its cursors."""

    __slots__ = ("__weakref__", "_connection", "close")

    def __init__(self, path: Path) -> None:
        # Only what is immutable can be opened without a lock, also in a folder that cannot be written.
        uri = f"{path.as_uri()}?mode=ro&immutable=1"
        self._connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self.close = weakref.finalize(self, self._connection.close)  # at the end of the process, too

    def execute(self, query: str, values: Sequence[str] = ()) -> sqlite3.Cursor:
        return self._connection.execute(query, values)
