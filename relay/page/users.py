"""The users of the page: a file of ``name:hash:role`` lines, and how often a password may be tried.

The file is read again when it has changed; one that cannot be used is told in the log, and the former users stay. At
the start and at a reload it is an error instead. A name has five tries a minute from one network, a network twenty.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from relay import maillog
from relay.config.model import StatusSettings
from relay.ledger.page_access import ROLES
from relay.mail.addresses import network_prefix
from relay.mail.text import printable
from relay.smtpd.passwords import Users, read_hash, read_lines

TRIES = 5  # of one name from one network
TRIES_OF_NETWORK = 20  # of all names together
TRIES_SECONDS = 60.0
_KNOWN = 10_000  # counts that are kept; the oldest goes first
LOOK_SECONDS = 2.0  # between two looks whether the file has changed
_LONGEST = 256  # characters of a name


class User(NamedTuple):
    """What one may do, and a mark that changes with the password."""

    role: str
    mark: str


@dataclass(frozen=True, slots=True)
class Directory:
    """The users of a file."""

    users: Mapping[str, User]
    passwords: Users

    @classmethod
    def read(cls, path: Path) -> Directory:
        """Read the file. Raises OSError whose one line names the setting."""
        hashes, users = {}, {}
        try:
            for place, name, rest in read_lines(path):
                text, role = _split(place, name, rest)
                hashes[name] = read_hash(text, place)
                users[name] = User(role, hashlib.sha256(text.encode()).hexdigest())
        except OSError as error:
            raise OSError(f"status.users_file: {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise OSError(f"status.users_file: {printable(str(error))}") from error
        return cls(users, Users(hashes, at_once=1))  # whoever guesses takes a core at most, and mail has the others


def _split(place: str, name: str, rest: str) -> tuple[str, str]:
    text, _, role = rest.rpartition(":")
    if role not in ROLES:
        raise ValueError(f"{place}: expected name:hash:viewer or name:hash:operator")
    if len(name) > _LONGEST or not name.isprintable():
        raise ValueError(f"{place}: expected a name of at most {_LONGEST} printable characters")
    return text, role


def check(settings: StatusSettings) -> int | None:
    """See that the users file can be used: returns how many users it has, None without a file. Raises OSError."""
    if settings.users_file is None or not settings.listen:
        return None
    return len(Directory.read(settings.users_file).users)


class CurrentUsers:
    """The users as the file has them now. ``path`` None: nobody can log in by password."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._directory = Directory({}, Users({}))
        self._seen: object = None
        self._looked = -LOOK_SECONDS
        self.waiting_passwords = 0

    def add_waiting_password(self, change: int) -> None:
        self.waiting_passwords += change

    def find(self, name: str) -> User | None:
        """Return a user, None for nobody."""
        return self._current().users.get(name)

    async def log_in(self, name: str, password: str) -> User | None:
        """Return the user whose password this is, else None. Raises passwords.Busy if too many wait."""
        directory = self._current()
        if not await directory.passwords.check(name, password, queue=self):
            return None
        return directory.users.get(name)

    def _current(self) -> Directory:
        now = time.monotonic()
        if self._path and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            try:
                found = self._path.stat()
                seen: object = (found.st_mtime_ns, found.st_ino, found.st_size)
            except OSError as error:
                seen = str(error)
            if seen != self._seen:
                self._seen = seen
                try:
                    self._directory = Directory.read(self._path)
                except OSError as error:
                    maillog.notice("error", "the page goes on with the users that it knows", reason=str(error))
        return self._directory


class Tries:
    """How often a password has been tried lately, right or wrong."""

    def __init__(self) -> None:
        self._times: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()

    def take(self, address: str, name: str) -> bool:
        """Note a try; False if there were too many."""
        network = network_prefix(address)
        pair, whole = self._of((network, name)), self._of((network, ""))
        if len(pair) >= TRIES or len(whole) >= TRIES_OF_NETWORK:
            return False
        now = time.monotonic()
        pair.append(now)
        whole.append(now)
        return True

    def forgive(self, address: str, name: str) -> None:
        """Forget the tries of who has known the password."""
        network = network_prefix(address)
        pair = self._times.pop((network, name), deque())
        whole = self._of((network, ""))
        for _ in range(min(len(pair), len(whole))):
            whole.pop()

    def _of(self, key: tuple[str, str]) -> deque[float]:
        times = self._times.setdefault(key, deque())
        self._times.move_to_end(key)
        if len(self._times) > _KNOWN:
            self._times.popitem(last=False)
        oldest = time.monotonic() - TRIES_SECONDS
        while times and times[0] <= oldest:
            times.popleft()
        return times
