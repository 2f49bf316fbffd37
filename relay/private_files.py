"""Private folders, files and locks: opened by name within a trusted folder, without following links.

A folder that other users can write to is closed to them; a folder of another user is refused, and a file of another
user is left alone: both raise Foreign, an OSError whose text names the owner. Files of root are trusted (ownership.py).
If this process is root, the owner of the state folder is trusted too and gets everything created there: a command run
by root must not leave files that the service cannot write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from relay import maillog, ownership
from relay.ownership import is_ours

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")
_owner: tuple[int, int] | None = None  # uid and gid of the state folder, if this process is root and they are not


class Foreign(OSError):
    """A folder or file that belongs to another user or is of the wrong kind."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(errno.EPERM, text, str(path))


def trust(state_dir: Path) -> None:
    """If this process is root, trust the owner of the state folder: a command may be run as root."""
    global _owner  # noqa: PLW0603 - one for each process
    _owner = None
    ownership.trust(state_dir)
    if os.geteuid() == 0 and state_dir.is_dir():
        found = state_dir.stat()
        _owner = (found.st_uid, found.st_gid) if found.st_uid else None


def give(made: Path | int) -> None:
    """Give a new path or open file in the state folder to the owner of that folder. Raises OSError."""
    if _owner is not None:
        os.chown(made, *_owner)


def folder(path: Path, *, is_named: bool = False) -> None:
    """Create a folder that is closed to other users, or close an existing one. Raises Foreign, OSError.

    A folder named in the settings (``is_named``) may be a mount that root owns and everybody can write to, as in
    containers: the owner of each file in it is checked anyway.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
        give(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    if path.is_symlink() and not is_ours(path.lstat().st_uid):
        raise Foreign(path, "it is a symbolic link of another user: remove it")
    found = path.stat()
    if is_named:
        ownership.trust(path)  # root runs a command, or a container, on a folder of the service
    if not is_ours(found.st_uid):
        raise Foreign(path, f"it belongs to user {found.st_uid}: chown it to the user of this service, or name another")
    if found.st_mode & stat.S_ISVTX and found.st_mode & 0o002:
        raise Foreign(path, "it is everybody's: name a folder below it")
    # A mount that root owns may be open to group and others; any other folder is closed to them.
    if found.st_mode & 0o022 and (found.st_uid != 0 or os.geteuid() == 0):
        path.chmod(found.st_mode & 0o7700)
        mode = f"{found.st_mode & 0o7777:04o}"
        maillog.notice("warning", "a folder that others could write to is closed", folder=str(path), mode=mode)
    elif found.st_mode & 0o002 and not is_named:
        raise Foreign(path, "everybody may write to it: chmod 700")


def is_closed(folder: Path) -> bool:
    """Return whether a folder belongs to a trusted user and nobody else can write there. Raises OSError."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and is_ours(found.st_uid) and not found.st_mode & 0o022


def is_socket_of_ours(found: os.stat_result) -> bool:
    """Return whether the result of an lstat is a socket of a trusted user."""
    return stat.S_ISSOCK(found.st_mode) and is_ours(found.st_uid)


def is_file_of_ours(found: os.stat_result) -> bool:
    """Return whether the result of an lstat or fstat is a regular file of a trusted user."""
    return stat.S_ISREG(found.st_mode) and is_ours(found.st_uid)


def open_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file; a link, a pipe or another user's file is Foreign. Raises Foreign, OSError."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES}:
            raise Foreign(path, f"it is no lock file of ours ({error.strerror}): remove it") from error
        raise
    if not is_file_of_ours(os.fstat(descriptor)):
        os.close(descriptor)
        raise Foreign(path, "it is no lock file of ours: remove it")
    return descriptor


def take_lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file or folder until it is closed. Raises BlockingIOError while another process has the lock."""
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def open_locked(path: Path, flags: int = os.O_RDWR | os.O_CREAT, *, shared: bool = False) -> int:
    """Open a lock file and lock it until it is closed. Raises BlockingIOError, and what ``open_lock`` raises."""
    descriptor = open_lock(path, flags)
    try:
        take_lock(descriptor, shared=shared)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, after whoever holds it now. Raises what ``open_lock`` raises."""
    descriptor = open_lock(path)
    try:
        take_lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def read(where: Path, name: str, size: int | None = None) -> bytes:
    """Return the content of a private file in a folder. Raises Foreign, OSError, FileNotFoundError.

    With ``size``, at most ``size`` + 1 octets are read, so that the caller sees whether the file is longer.
    """
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise Foreign(where, "no name of a file")
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        owner = os.fstat(directory).st_uid
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise Foreign(where / name, "it is a symbolic link") from error
        raise
    finally:
        os.close(directory)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Foreign(where / name, "it is no file")
        # Root also trusts the owner of the folder: once it is closed, only the owner can write there.
        if not is_ours(found.st_uid) and (os.geteuid() != 0 or found.st_uid != owner):
            raise Foreign(where / name, f"it belongs to user {found.st_uid}")
        return file.read() if size is None else file.read(size + 1)


def write(where: Path, name: str, data: bytes, *, durable: bool = True, like: os.stat_result | None = None) -> None:
    """Write a file atomically into a private folder, with fsync if ``durable``. Raises OSError.

    Other users cannot read it, unless it takes owner and mode from another file, ``like``.
    """
    directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        write_at(directory, name, data, f".{name}.{os.getpid()}.tmp", durable=durable, like=like)
        if durable:
            os.fsync(directory)
    finally:
        os.close(directory)


def write_at(
    directory: int,
    name: str,
    data: bytes,
    temporary: str,
    *,
    durable: bool = True,
    like: os.stat_result | None = None,
) -> None:
    """Write a file atomically into an open folder; the caller does the fsync of the folder. Raises OSError.

    Each writer needs a ``temporary`` name of its own; a file that stays there is left by a killed process.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
    except FileExistsError:
        os.unlink(temporary, dir_fd=directory)
        descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        try:
            if like is None:
                give(descriptor)
            else:
                os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, like.st_mode & 0o777)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def written(name: str) -> str:
    """Return the final name of a file, also for a temporary one that a killed process left.

    Version 0.1.0 only appended the suffix to the final name.
    """
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else name.removesuffix(".tmp")
