"""What a start needs before any process of ours runs: room for clients, the state folder, memory for the metrics.

Whatever prevents a start (a port in use, a Redis that does not answer, a state folder that cannot be written) is a
StartError of one line, and by then nothing runs.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from relay import early_signals, limits, log_lines, maillog, ownership, private_files
from relay.config.loader import Settings
from relay.trace import emitter

if TYPE_CHECKING:
    from relay import metric_store


class StartError(Exception):
    """It cannot be started; the text is one line for the operator."""


class NoRedis(StartError):
    """It cannot be started, since Redis is away or does not answer."""


@dataclass(frozen=True, slots=True)
class Role:
    """What one command runs."""

    name: str
    relays: bool
    delivers: bool


UP = Role("up", relays=True, delivers=True)
RELAY = Role("relay", relays=True, delivers=False)
WORKERS = Role("workers", relays=False, delivers=True)


class EarlyStop:
    """Until the supervisor takes over, a stop signal is a SystemExit, so that what was begun is undone."""

    def __init__(self) -> None:
        self._came = False
        early_signals.catch()
        # Whoever started us may have them ignored (nohup, `&` in a script) or blocked, and we inherit that.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raise it again: Python drops an exception that comes within a callback of fork()."""
        if self._came:
            sys.exit(0)

    @staticmethod
    def end() -> None:
        """Ignore such signals from now on: all has ended, and only our folders are left to be removed."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._came = True
        sys.exit(0)


def fitted(settings: Settings, role: Role) -> Settings:
    """Raise the limit of open files, and cut the number of clients to what fits. Raises StartError."""
    limit = limits.raise_files()
    smtp = settings.smtp
    try:
        limits.worker_connections(limit, 1)
        if not role.relays:
            return settings
        fit = limits.relay_fit(
            limit, smtp.max_connections, smtp.process_count, len(smtp.addresses + smtp.tls_addresses)
        )
    except limits.TooLow as error:
        raise StartError(str(error)) from error
    if fit.clients < smtp.max_connections:
        maillog.notice(
            "warning",
            "smtp.max_connections is cut to what the limit of open files allows: raise that (ulimit -Hn, LimitNOFILE=)",
            limit=limit,
            wanted=smtp.max_connections,
            connections=fit.clients,
        )
    return replace(settings, smtp=replace(smtp, max_connections=fit.clients))


def make_state_dir(folder: Path) -> None:
    """Make the state folder, see that it can be written, and remove the metrics files that 0.1.0 left there."""
    folder = folder.absolute()
    try:
        private_files.folder(folder, is_named=True)
    except OSError as error:
        raise StartError(f"state_dir: {error.filename or folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartError(f"state_dir: {folder} cannot be written")
    with suppress(OSError):
        for old in (folder / "metrics").iterdir():
            with suppress(OSError), ExitStack() as closing:  # locked: one of those runs, on the same state folder
                descriptor = os.open(old, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                closing.callback(os.close, descriptor)
                private_files.take_lock(descriptor)
                shutil.rmtree(old, ignore_errors=True)
        (folder / "metrics").rmdir()


def warn_of_settings_files(settings: Settings) -> None:
    """Say which file of settings another user could change: whoever can decides where mail goes."""
    named = {Path(re.sub(r":[0-9]+$", "", origin)) for origin in settings.origins.values()}
    for path in sorted(path for path in named if path.suffix in {".toml", ".yaml", ".yml"}):
        with suppress(OSError):
            if fault := ownership.fault_of_secret(path):
                maillog.notice("warning", "settings that another user could change", reason=fault)


def take(state_dir: Path, role: Role, ends: ExitStack) -> None:
    """Take the state folder for what this role does, whatever Redis is used: relay and workers may share one.

    Two relays would take each other's mail for that of dead ones. The lock is a process's, not inherited by what it
    forks: children that drain when their supervisor is dead keep nobody from starting.
    """
    for part in [name for name, is_ours in (("relay", role.relays), ("workers", role.delivers)) if is_ours]:
        path = state_dir.absolute() / f"{part}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = private_files.open_lock(path)
            ends.callback(os.close, descriptor)
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # the lock is what counts; a full disk need not know who has it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except BlockingIOError as error:
            owner = path.read_text("ascii", "replace").strip() or "unknown"
            raise StartError(
                f"another smtp-dup (process {owner}) uses the state folder {state_dir} for its {part}: "
                "give each a state_dir of its own"
            ) from error
        except OSError as error:  # read-only, or a network file system without locks
            raise StartError(f"state_dir: {path}: {error.strerror}") from error


def arena(name: str) -> metric_store.Arena | None:
    """Return where all processes count, us among them; metrics are never a reason not to start."""
    from relay import metric_store, metrics  # noqa: F401, PLC0415  (what counts must be there before we take our place)

    try:
        made = metric_store.Arena()
    except (OSError, ValueError) as error:
        maillog.notice("warning", "no memory for the metrics: there are none", reason=str(error))
        return None
    made.reserve(name)
    made.take(name)
    log_lines.on_trouble = made.events.note
    return made


def trace_channel() -> tuple[socket.socket, socket.socket] | None:
    """Return the ends of the channel for the trace, to read and to write; it is never a reason not to start."""
    try:
        return emitter.channel()
    except OSError as error:
        maillog.notice("warning", "no channel for the trace: there is none", reason=str(error))
        return None
