"""The users that may log in: a file of ``name:hash`` lines, and the check of a password.

A hash is scrypt in PHC form, as written by `smtp-dup hash-password`: ``$scrypt$ln=14,r=8,p=1$<salt>$<hash>`` (base64
without padding). A check takes some 50 ms of a thread; a password that was right before needs no check. A file that
cannot be used raises a ValueError that names the line and never contains a password.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from relay.ownership import fault_of_secret

_LN, _R, _P = 14, 8, 1  # a check takes 16 MiB and some 50 ms
_LONGEST = 1024  # octets of a password
_AT_ONCE = 4  # checks that run at the same time in a process
_MOST_WAITING = 60  # checks that wait in all processes: some seconds of work
_REMEMBERED = 1000
_PHC = re.compile(r"\$scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{8,86})\$([A-Za-z0-9+/]{22,86})")


class Busy(Exception):
    """Too many passwords wait to be checked."""


class Queue(Protocol):
    """How many passwords wait to be checked, in all processes."""

    @property
    def waiting_passwords(self) -> int: ...

    def add_waiting_password(self, change: int) -> None: ...


class Hash(NamedTuple):
    """The parameters, the salt and the digest of a password."""

    ln: int
    r: int
    p: int
    salt: bytes
    digest: bytes

    def matches(self, password: bytes) -> bool:
        made = _scrypt(password, self.ln, self.r, self.p, self.salt, len(self.digest))
        return hmac.compare_digest(made, self.digest)


_NOBODY = Hash(_LN, _R, _P, b"nobody-has-this!", bytes(32))  # checked for an unknown name, to take as long


def hash_password(password: str) -> str:
    """Return the hash of a password for the users file."""
    salt = os.urandom(16)
    digest = _scrypt(password.encode(), _LN, _R, _P, salt, 32)
    return f"$scrypt$ln={_LN},r={_R},p={_P}${_base64(salt)}${_base64(digest)}"


class Users:
    """Who may log in."""

    def __init__(self, hashes: Mapping[str, Hash], at_once: int = _AT_ONCE) -> None:
        self._hashes = dict(hashes)
        self._key = os.urandom(32)  # keys the remembered digests, so that they are useless outside this process
        self._remembered: dict[bytes, None] = {}
        self._room = asyncio.Semaphore(at_once)

    @classmethod
    def read(cls, path: Path) -> Users:
        """Read the file. Raises ValueError with the reason, and OSError."""
        return cls({name: read_hash(text, place) for place, name, text in read_lines(path)})

    def __len__(self) -> int:
        return len(self._hashes)

    async def check(
        self, name: str, password: str, wanted: Callable[[], bool] = lambda: True, queue: Queue | None = None
    ) -> bool:
        """Return whether this is the user's password. Raises Busy if too many checks wait.

        ``wanted`` is asked before the check; if it says no, the result is False. ``queue`` counts the waiting checks;
        without it there is no limit.
        """
        known = self._hashes.get(name)
        secret = password.encode("utf-8", "surrogateescape")
        if len(secret) > _LONGEST:
            return False
        mark = self._mark(name, secret)
        if mark in self._remembered:
            return True
        if queue is not None and queue.waiting_passwords >= _MOST_WAITING:
            raise Busy
        if queue is not None:
            queue.add_waiting_password(1)
        try:
            await self._room.acquire()
        finally:
            if queue is not None:
                queue.add_waiting_password(-1)
        try:
            if not wanted():
                return False
            right = await asyncio.to_thread((known or _NOBODY).matches, secret)
        finally:
            self._room.release()
        if known is None or not right:
            return False
        if len(self._remembered) >= _REMEMBERED:
            self._remembered.clear()
        self._remembered[mark] = None
        return True

    def remembers(self, name: str, password: str) -> bool:
        """Return whether this password was right before; this needs no check."""
        return self._mark(name, password.encode("utf-8", "surrogateescape")) in self._remembered

    def _mark(self, name: str, secret: bytes) -> bytes:
        return hmac.digest(
            self._key, b"%d:%s:%s" % (len(name), name.encode("utf-8", "surrogateescape"), secret), "sha256"
        )


def read_lines(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield place, name and the rest of each line of a users file. Raises ValueError with the reason, and OSError."""
    names: set[str] = set()
    if fault := fault_of_secret(path):
        raise ValueError(fault)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, text = line.strip().partition(":")
        if not name or name in names:
            raise ValueError(f"{path}:{number}: expected a name that is not there yet, then : and a hash")
        names.add(name)
        yield f"{path}:{number}", name, text


def read_hash(text: str, place: str) -> Hash:
    """Read a hash of a users file, in PHC form. Raises ValueError with the place."""
    found = _PHC.fullmatch(text.strip())
    if found is not None:
        ln, r, p = (int(found[n]) for n in (1, 2, 3))
        if 10 <= ln <= 18 and 1 <= r <= 16 and 1 <= p <= 8:  # neither too weak nor too dear
            with suppress(binascii.Error):
                return Hash(ln, r, p, _octets(found[4]), _octets(found[5]))
    raise ValueError(f"{place}: expected a hash made by `smtp-dup hash-password`")


def _scrypt(password: bytes, ln: int, r: int, p: int, salt: bytes, size: int) -> bytes:
    n = 1 << ln
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=160 * n * r * p + (1 << 20), dklen=size)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii").rstrip("=")


def _octets(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
