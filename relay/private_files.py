"""Folders, files and locks of ours: opened by their names alone, below a folder that is ours, and no link followed.

A folder that others may write to is closed to them; one that belongs to another user is refused. A file that another
user put there is theirs: it is left where it is. Both are a Foreign, an OSError whose text says whose it is. Root's are
as good as ours; when we are root, so are those of whoever owns the state folder, and what we make there becomes theirs:
a command that root has run must leave nothing that the service cannot write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path

from relay import maillog, ownership
from relay.ownership import is_ours

_TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")
_owner: tuple[int, int] | None = None  # user and group of the state folder, when we are root and they are not


class Foreign(OSError):
    """A folder or file that belongs to another user, or is no file at all."""

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(errno.EPERM, text, str(path))


def trust(state_dir: Path) -> None:
    """Take the owner of the state folder for one of us, when we are root: a command may be run as root."""
    global _owner  # noqa: PLW0603
    _owner = None
    ownership.trust(state_dir)
    if os.geteuid() == 0 and state_dir.is_dir():
        found = state_dir.stat()
        _owner = (found.st_uid, found.st_gid) if found.st_uid else None


def give(made: Path | int) -> None:
    """Give what we have just made in the state folder, a path or an open file, to the owner of that. Raises OSError."""
    if _owner is not None:
        os.chown(made, *_owner)


def folder(path: Path, *, is_named: bool = False) -> None:
    """Make a folder that is open to nobody else, or close it. Raises Foreign, OSError.

    One that the settings name (``is_named``) may be a mount of root's that lets everybody in, as containers have them:
    nothing that lies directly in it is believed without a look at its owner.
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
        ownership.trust(path)  # a command, or a container, of root's on a folder of the service's
    if not is_ours(found.st_uid):
        raise Foreign(path, f"it belongs to user {found.st_uid}: chown it to the user of this service, or name another")
    if found.st_mode & stat.S_ISVTX and found.st_mode & 0o002:
        raise Foreign(path, "it is everybody's: name a folder below it")
    # Group and others may be let in by a mount that root owns; who else owns it is closed to them.
    if found.st_mode & 0o022 and (found.st_uid != 0 or os.geteuid() == 0):
        path.chmod(found.st_mode & 0o7700)
        mode = f"{found.st_mode & 0o7777:04o}"
        maillog.notice("warning", "a folder that others could write to is closed", folder=str(path), mode=mode)
    elif found.st_mode & 0o002 and not is_named:
        raise Foreign(path, "everybody may write to it: chmod 700")


def is_file_of_ours(found: os.stat_result) -> bool:
    """Say whether this is a regular file that nobody else has made; of an lstat, or of what was opened."""
    return stat.S_ISREG(found.st_mode) and is_ours(found.st_uid)


def open_lock(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file of ours: no link, no pipe, nobody else's. Raises Foreign, OSError, FileNotFoundError."""
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
    """Open a lock file of ours and lock it until it is closed. Raises BlockingIOError, and what ``open_lock`` does."""
    descriptor = open_lock(path, flags)
    try:
        take_lock(descriptor, shared=shared)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(where: Path, name: str, size: int | None = None) -> bytes:
    """Return what is in a file of ours below a folder. Raises Foreign, OSError, FileNotFoundError.

    With ``size`` at most one octet more is read: what is longer is not what it says.
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
        # Root reads what the owner of the folder has put there: nobody else could, once the folder is closed.
        if not is_ours(found.st_uid) and (os.geteuid() != 0 or found.st_uid != owner):
            raise Foreign(where / name, f"it belongs to user {found.st_uid}")
        return file.read() if size is None else file.read(size + 1)


def write(where: Path, name: str, data: bytes, *, durable: bool = True, like: os.stat_result | None = None) -> None:
    """Put a file into a folder of ours as a whole, on stable storage unless it need not be ``durable``. Raises OSError.

    It is readable for nobody else, or has the owner and the mode of another file, ``like``.
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
    """Put a file into an open folder; the caller sees to it that its name is on stable storage. Raises OSError.

    What stays behind under the ``temporary`` name is of a process that was killed; no two may write under the same.
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
    """Return the name of the file that this one is, or was to become: a process that is killed leaves it half written.

    0.1.0 had only the ending.
    """
    found = _TEMPORARY.fullmatch(name)
    return found[1] if found else name.removesuffix(".tmp")
