"""The files of the trace: SQLite, one for an hour (UTC) and role, in ``state_dir/trace``; oldest ones go as a whole.

A file has rows, each with events of one message, and words (search_terms.py) that lead to them, as short hashes: what
is found is compared. Where mail is sealed (storage.key_file) so is each row, by a key that is kept in the file, itself
sealed; the hashes are keyed then, and say nothing of the words. Nothing is synced to the disk: what a power cut takes
is no mail. A file that is damaged is set aside in the folder ``corrupt``, once whoever writes it is done with it; the
others go on. Raises sqlite3.Error, OSError.
"""

from __future__ import annotations

import base64
import binascii
import calendar
import contextlib
import hashlib
import os
import re
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from relay import private_files
from relay.batches import batched
from relay.mail import encryption
from relay.mail.stored import parsed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER, CORRUPT = "trace", "corrupt"
HOUR = 3600
_NAME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d)\.(up|relay|workers)\.(\d{1,6})\.sqlite")
_BESIDE = ("-wal", "-shm", "-journal")
_VERSION = 2
_KEY_OCTETS, _NONCE_OCTETS = 32, 12
_PATIENCE = 2.0  # seconds for a lock: a reader never has one for long
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_AT_ONCE = 500  # words or rows in one statement
# Rows are numbered; so many bits of a number are within one part of the index. A write then touches the pages of one
# part, a tenth of a page for each message, and not those of the whole hour; a look-up asks each part.
_PART_BITS = 13
_BY_WORD = """
WITH RECURSIVE parts(part) AS (VALUES (0) UNION ALL SELECT part + 1 FROM parts WHERE part < ?)
SELECT words.row FROM parts CROSS JOIN words ON words.part = parts.part AND words.word IN (%s)
"""
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE rows (n INTEGER PRIMARY KEY, data BLOB);
CREATE TABLE words (part INTEGER, word INTEGER, row INTEGER, PRIMARY KEY (part, word, row)) WITHOUT ROWID;
"""

Row = tuple[bytes, Sequence[str]]  # the events of a message as JSON, and the words by which they are found


class ClosedFile(Exception):
    """A file that cannot be read as it is: of another version, or sealed with a key that is not there."""


class DamagedFile(Exception):
    """A file whose content is none of ours."""


def folder_of(state_dir: Path) -> Path:
    """Return the folder of the trace."""
    return state_dir.absolute() / FOLDER


@dataclass(frozen=True, slots=True, order=True)
class HourFile:
    """A file of the folder, by its name: the hour, as seconds since the epoch, the role that writes it, its number."""

    hour: int
    number: int
    role: str
    path: Path

    @property
    def octets(self) -> int:
        """What it takes on the disk, with what SQLite has beside it."""
        total = 0
        for path in self.all_paths:
            with contextlib.suppress(OSError):
                total += path.stat().st_size
        return total

    @property
    def all_paths(self) -> list[Path]:
        return [self.path, *(self.path.with_name(self.path.name + end) for end in _BESIDE)]

    def remove(self) -> None:
        """Delete it. Raises OSError."""
        for path in reversed(self.all_paths):
            path.unlink(missing_ok=True)

    def set_aside(self) -> Path:
        """Move it to where nobody looks for it, for the operator. Raises OSError."""
        aside = self.path.parent / CORRUPT
        private_files.folder(aside)
        for path in self.all_paths:
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside / path.name)
        return aside / self.path.name


def named(folder: Path, at: float, role: str, number: int) -> HourFile:
    """Return the file of this hour, role and number, whether it is there or not."""
    hour = int(at) // HOUR * HOUR
    name = time.strftime("%Y-%m-%dT%H", time.gmtime(hour))
    return HourFile(hour, number, role, folder / f"{name}.{role}.{number}.sqlite")


def listed(folder: Path) -> list[HourFile]:
    """Return the files that are there, the oldest first; what has another name is not ours. Raises OSError."""
    found = []
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names are all that is looked at
    except (FileNotFoundError, NotADirectoryError):
        return []
    for name in names:
        if parts := _NAME.fullmatch(name):
            with contextlib.suppress(ValueError, OverflowError):
                hour = calendar.timegm(time.strptime(parts[1], "%Y-%m-%dT%H"))
                found.append(HourFile(hour, int(parts[3]), parts[2], folder / name))
    return sorted(found)


# Open files ------------------------------------------------------------------------------------------------------


class OpenFile:
    """A file that is open, for a reader or the writer."""

    def __init__(self, file: HourFile, connection: sqlite3.Connection) -> None:
        self.file = file
        self._connection = connection
        self._cipher: AESGCM | None = None
        self._hash: Any = None

    @property
    def is_sealed(self) -> bool:
        return self._cipher is not None

    def take_secret(self) -> None:
        """Take the file's key. Raises ClosedFile, DamagedFile."""
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            raise ClosedFile(f"it is of version {version}") if version else DamagedFile("it has no content")
        found = dict(self._connection.execute("SELECT name, value FROM meta").fetchall())
        try:
            is_sealed = "sealed" in found
            text = encryption.open_word(_place(self.file), found["sealed"]) if is_sealed else found["secret"]
            self._use(base64.b64decode(text, validate=True), is_sealed=is_sealed)
        except (encryption.MissingKey, ImportError) as error:
            raise ClosedFile(str(error)) from error
        except (KeyError, TypeError, AttributeError, binascii.Error, ValueError) as error:
            raise DamagedFile("its key is damaged") from error

    def _use(self, secret: bytes, *, is_sealed: bool) -> None:
        if len(secret) != _KEY_OCTETS:
            raise ValueError("no key")
        if is_sealed:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415  (storage.key_file alone needs it)

            self._hash = hashlib.blake2b(digest_size=6, key=secret, person=b"smtp-dup word")
            self._cipher = AESGCM(hashlib.blake2b(b"rows", digest_size=32, key=secret).digest())

    def word(self, word: str) -> int:
        """Return the hash of a word. It is for the index alone: what is found by it is compared."""
        octets = word.encode("utf-8", "surrogatepass")
        if self._hash is None:
            return crc32(octets)
        made = self._hash.copy()
        made.update(octets)
        return int.from_bytes(made.digest(), "big")

    # --- for the writer ---

    def create(self) -> None:
        """Give an empty file its tables and a key of its own."""
        secret = os.urandom(_KEY_OCTETS)
        text = base64.b64encode(secret).decode("ascii")
        is_sealed = encryption.is_on()
        meta = ("sealed", encryption.seal_word(_place(self.file), text)) if is_sealed else ("secret", text)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT")
        self._connection.execute("INSERT INTO meta VALUES (?, ?)", meta)
        self._use(secret, is_sealed=is_sealed)

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows, all or none."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            (last,) = connection.execute("SELECT coalesce(max(n), 0) FROM rows").fetchone()
            numbered = list(enumerate(rows, last + 1))
            connection.executemany(
                "INSERT INTO rows VALUES (?, ?)", [(n, self._sealed(data)) for n, (data, _) in numbered]
            )
            # In the order of the tree, so that neighbours are written together.
            words = sorted([(n >> _PART_BITS, self.word(word), n) for n, (_, found) in numbered for word in found])
            connection.executemany("INSERT OR IGNORE INTO words VALUES (?, ?, ?)", words)
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def finish(self) -> None:
        """Close it for good: one file, which can be read from where nothing can be written."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode = DELETE")
        self.close()

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()

    # --- for readers ---

    def rows_of(self, groups: Sequence[Iterable[str]]) -> list[int]:
        """Return the numbers of rows that have a word of each group, the newest first; all for no group."""
        if not groups:
            return [n for (n,) in self._connection.execute("SELECT n FROM rows ORDER BY n DESC")]
        (last,) = self._connection.execute("SELECT coalesce(max(n), 0) FROM rows").fetchone()
        found: set[int] | None = None
        for group in groups:
            hashes = [self.word(word) for word in group]
            numbers: set[int] = set()
            for page in batched(hashes, _AT_ONCE):
                select = _BY_WORD % ",".join("?" * len(page))
                numbers.update(n for (n,) in self._connection.execute(select, (last >> _PART_BITS, *page)))
            found = numbers if found is None else found & numbers
            if not found:
                return []
        return sorted(found or (), reverse=True)

    def read(self, numbers: Sequence[int]) -> list[list[Any]]:
        """Return the events in these rows, in the order of the rows; what cannot be read is left out."""
        found: dict[int, list[Any]] = {}
        for page in batched(numbers, _AT_ONCE):
            marks = ",".join("?" * len(page))
            for n, data in self._connection.execute(f"SELECT n, data FROM rows WHERE n IN ({marks})", page):  # noqa: S608 - marks
                with contextlib.suppress(ValueError, TypeError):
                    content = parsed(self._opened(data))
                    found[n] = content if isinstance(content, list) else []
        return [found[n] for n in numbers if n in found]

    def _sealed(self, data: bytes) -> bytes:
        if self._cipher is None:
            return data
        nonce = os.urandom(_NONCE_OCTETS)
        return nonce + self._cipher.encrypt(nonce, data, None)

    def _opened(self, data: bytes) -> bytes:
        if self._cipher is None:
            return data
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415  (storage.key_file alone needs it)

        try:
            return self._cipher.decrypt(data[:_NONCE_OCTETS], data[_NONCE_OCTETS:], None)
        except InvalidTag as error:
            raise ValueError("it is not what was sealed") from error


def _place(file: HourFile) -> str:
    """Return the place in which a file's key is sealed: it opens in no other file."""
    return f"trace {file.path.name}"


def open_to_read(file: HourFile) -> OpenFile:
    """Open a file that is there. Raises ClosedFile, DamagedFile, OSError, sqlite3.Error."""
    if not private_files.is_file_of_ours(file.path.lstat()):
        raise ClosedFile("it is no file of this user")
    has_journal = any(path.exists() for path in file.all_paths[1:3])
    # A file that its writer has finished is read as it is: that works where nothing can be written, too.
    mode = "mode=rw" if has_journal else "mode=ro&immutable=1"
    return _opened(file, mode)


def open_to_write(file: HourFile) -> OpenFile:
    """Open a file, which is made where there is none. Raises ClosedFile, DamagedFile, OSError, sqlite3.Error."""
    if not file.path.exists():
        # Made by us and not by SQLite: it is private from its first octet on.
        private_files.write(file.path.parent, file.path.name, b"", durable=False)
    elif not private_files.is_file_of_ours(file.path.lstat()):
        raise ClosedFile("it is no file of this user")
    return _opened(file, "mode=rw", is_new=not file.path.stat().st_size)


def _opened(file: HourFile, mode: str, *, is_new: bool = False) -> OpenFile:
    quoted = str(file.path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    connection = sqlite3.connect(
        f"file:{quoted}?{mode}", uri=True, isolation_level=None, timeout=_PATIENCE, check_same_thread=False
    )
    found = OpenFile(file, connection)
    try:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA trusted_schema = OFF")
        if is_new:
            found.create()
        else:
            found.take_secret()
    except BaseException:
        found.close()
        raise
    return found


def is_damage(error: BaseException) -> bool:
    """Say whether an error means that the file is none of ours any more."""
    if isinstance(error, DamagedFile):
        return True
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    missing = isinstance(error, sqlite3.OperationalError) and str(error).startswith("no such table")
    return missing or (code is not None and code & 0xFF in _DAMAGED)
