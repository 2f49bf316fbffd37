"""Encryption at rest: with ``storage.key_file``, envelope and body of every stored message are sealed (encrypted).

The file has a key on each line, ``<id>:<key>``, as written by `smtp-dup new-key`: the first one seals, all of them
open; below a first line ``plain`` none seals. The id is a hash of the key, so that a damaged line is detected at the
start. A process has one keyring, set before it stores or reads anything; without one nothing is sealed, and no cipher
is imported.

Each record is sealed with a key of its own, derived (HMAC-SHA256) from the file's key, the message id and a random
salt, so that AES-256-GCM never uses a nonce twice and a record opens under its own id only. A key that is not in the
file raises MissingKey, with a text for the operator; a record that was changed or belongs to another message raises
Forged; a file that cannot be used raises BadKeyFile.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relay import private_files
from relay.ownership import fault_of_secret

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_OCTETS = 32
_ID_OCTETS = 4
_SALT_OCTETS = 16
_HEAD, _BODY = bytes(12), bytes(11) + b"\1"  # nonces: each key seals exactly one envelope and one body
_PURPOSE = b"smtp-dup record 2\0"

Cut = tuple[bytes, bytes]  # the part before the body (key id, salt, sealed envelope), and the sealed body


class MissingKey(LookupError):
    """A record's key is not in the key file; the text names it and says what to do."""


class Forged(ValueError):
    """A sealed record that was changed, truncated or put under another message's id."""


class BadKeyFile(ValueError):
    """A key file that cannot be used; the text is one line without any key."""


class _Key(NamedTuple):
    id: bytes
    secret: bytes

    @classmethod
    def of(cls, secret: bytes) -> _Key:
        return cls(hashlib.sha256(b"smtp-dup key id\0" + secret).digest()[:_ID_OCTETS], secret)

    @property
    def line(self) -> str:
        return f"{self.id.hex()}:{base64.b64encode(self.secret).decode('ascii')}"


class Keyring:
    """The keys of one file, by their ids; the first one seals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_at: tuple[int, ...] = ()
        self._keys: dict[bytes, bytes] = {}
        self.first: _Key | None = None  # None: the file begins with ``plain``
        self.read()

    @property
    def ids(self) -> list[str]:
        """The ids of the keys, in the order of the file."""
        return [key_id.hex() for key_id in self._keys]

    def read(self) -> None:
        """Read the file (again). Raises BadKeyFile, and then keeps the keys as they are."""
        found = _read(self.path)
        self._read_at = found.state
        self._keys = {key.id: key.secret for key in found.keys}
        self.first = found.keys[0] if found.seals else None

    @property
    def words(self) -> str:
        """Which key seals and which others open, for the log and `check`."""
        others = [key_id for key_id in self.ids if self.first is None or key_id != self.first.id.hex()]
        sealing = f"sealed with key {self.first.id.hex()}" if self.first else "stored as it is"
        return sealing + (f"; {', '.join(others)} can be opened" if others else "")

    def find(self, key_id: bytes) -> bytes:
        """Return a key by its id; the file is read again if it is not known yet. Raises MissingKey."""
        if key_id not in self._keys:
            try:
                if _state(self.path.stat()) != self._read_at:
                    self.read()
            except (BadKeyFile, OSError) as error:
                raise MissingKey(f"sealed with key {key_id.hex()}, and storage.key_file: {error}") from error
        if key_id not in self._keys:
            raise MissingKey(f"sealed with key {key_id.hex()}, which is not in {self.path}: put it back there")
        return self._keys[key_id]


_ring: Keyring | None = None


def use(path: Path | None) -> None:
    """Use the keys of this file in this process from now on; None: seal nothing. Raises BadKeyFile."""
    global _ring  # noqa: PLW0603 - one for each process: what is stored passes through many hands
    _ring = None if path is None else Keyring(path)


def ring() -> Keyring | None:
    """Return the keyring of this process, or None."""
    return _ring


def is_on() -> bool:
    """Return whether messages stored from now on are sealed."""
    return _ring is not None and _ring.first is not None


def reload() -> None:
    """Read the key file again. Raises BadKeyFile, and then keeps the keys as they are."""
    if _ring is not None:
        _ring.read()


# Words -----------------------------------------------------------------------------------------------------------


def pseudonym(word: str) -> str:
    """Return a keyed hash of a word, which can be compared but not read; only while encryption ``is_on``."""
    if _ring is None or _ring.first is None:
        raise RuntimeError("there is no key to make a pseudonym with")
    octets = word.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(octets, digest_size=8, key=_ring.first.secret, person=b"smtp-dup word").hexdigest()


def seal_word(place: str, word: str) -> str:
    """Seal a word stored at this place, an ASCII name; only while encryption ``is_on``."""
    return base64.b64encode(seal(place, 0, word.encode("utf-8", "surrogateescape"), b"")[0]).decode("ascii")


def open_word(place: str, sealed: str | bytes) -> str:
    """Open a word that was sealed for this place. Raises MissingKey, Forged."""
    try:
        front = base64.b64decode(sealed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Forged("it is not what was sealed") from error
    return open_front(place, front).envelope.decode("utf-8", "surrogateescape")


# Records ------------------------------------------------------------------------------------------------------


def seal(message_id: str, flags: int, envelope: bytes, body: bytes) -> Cut:
    """Seal a message; returns the parts before and of the body. Only while encryption ``is_on``."""
    if _ring is None or _ring.first is None:
        raise RuntimeError("there is no key to seal with")
    key, salt, owner = _ring.first, os.urandom(_SALT_OCTETS), message_id.encode("ascii", "surrogateescape")
    cipher = _cipher(key.secret, salt, owner)
    front = key.id + salt + cipher.encrypt(_HEAD, envelope, owner)
    return front, cipher.encrypt(_BODY, body, owner + bytes([flags]))


@dataclass(frozen=True, slots=True)
class Opened:
    """The envelope of a sealed message, and a function that opens its body."""

    envelope: bytes
    body: Callable[[bytes, int], bytes]  # (sealed body, flags of the record) -> body. Raises Forged


def open_front(message_id: str, front: bytes) -> Opened:
    """Open the part before the body. Raises MissingKey, Forged."""
    key_id, salt = front[:_ID_OCTETS], front[_ID_OCTETS : _ID_OCTETS + _SALT_OCTETS]
    if len(salt) < _SALT_OCTETS:
        raise Forged("truncated")
    if _ring is None:
        raise MissingKey(f"sealed with key {key_id.hex()}, and storage.key_file is not set: name the file that has it")
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415  (storage.key_file alone needs it)

    owner = message_id.encode("ascii", "surrogateescape")
    cipher = _cipher(_ring.find(key_id), salt, owner)

    def opened(nonce: bytes, sealed: bytes, context: bytes) -> bytes:
        try:
            return cipher.decrypt(nonce, sealed, context)
        except (InvalidTag, ValueError) as error:
            raise Forged(f"it is not what was sealed as {message_id} with key {key_id.hex()}") from error

    envelope = opened(_HEAD, front[_ID_OCTETS + _SALT_OCTETS :], owner)
    return Opened(envelope, lambda sealed, flags: opened(_BODY, sealed, owner + bytes([flags])))


def _cipher(secret: bytes, salt: bytes, owner: bytes) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415  (storage.key_file alone needs it)

    return AESGCM(hmac.digest(secret, _PURPOSE + salt + owner, "sha256"))


# The file -----------------------------------------------------------------------------------------------------


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class _File(NamedTuple):
    keys: list[_Key]
    seals: bool
    state: tuple[int, ...]


def _read(path: Path) -> _File:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            # Kubernetes and packages provide secrets as files of root that the service's group may read.
            if not stat.S_ISREG(found.st_mode):
                raise BadKeyFile(f"{path} is no regular file")
            if found.st_mode & (0o027 if found.st_uid == 0 else 0o077):
                raise BadKeyFile(f"{path} is open to others (mode {found.st_mode & 0o777:04o}): chmod 600")
            if fault := fault_of_secret(path, found):
                raise BadKeyFile(fault)
            text = file.read(1 << 20)
    except OSError as error:
        raise BadKeyFile(f"{path} cannot be read: {error.strerror}") from error
    keys: list[_Key] = []
    seals = True
    for number, line in enumerate(text.decode("ascii", "replace").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.strip() == "plain" and seals and not keys:
            seals = False
            continue
        key = _read_line(line.strip())
        if key is None or key in keys:
            raise BadKeyFile(f"{path}:{number}: expected another key as `smtp-dup new-key` writes it")
        keys.append(key)
    if not keys:
        raise BadKeyFile(f"{path} has no key: `smtp-dup new-key` makes one")
    return _File(keys, seals, _state(found))


def _read_line(line: str) -> _Key | None:
    name, _, text = line.partition(":")
    try:
        key = _Key.of(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return None
    return key if len(key.secret) == _KEY_OCTETS and hmac.compare_digest(key.id.hex(), name) else None


def new_key() -> str:
    """Return the line of a new random key for the key file."""
    return _Key.of(os.urandom(_KEY_OCTETS)).line


def add_key(path: Path) -> Sequence[str]:
    """Put a new key in front of those in a file, which is created if missing. Returns the ids. Raises BadKeyFile.

    The file is replaced as a whole and keeps its owner and mode.
    """
    try:
        before = path.stat() if path.exists() else None
        text = ""
        if before is not None:
            _read(path)
            text = path.read_text("ascii")
        private_files.write(path.parent, path.name, f"{new_key()}\n{text}".encode("ascii"), like=before)
    except OSError as error:
        raise BadKeyFile(f"{path} cannot be written: {error.strerror}") from error
    return Keyring(path).ids
