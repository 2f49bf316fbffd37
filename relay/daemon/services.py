"""The processes behind `up`, `relay` and `workers`: what is started, in which order, with which seams joined.

The one place besides the commands that knows relay and workers alike. Whatever prevents a start (a port in
use, a Redis that does not answer, a state folder that cannot be written) is a StartError of one line, and by
then nothing runs.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import TimeoutError as NoAnswer

from relay import limits, maillog, private_files
from relay.child import ChildContext
from relay.config.destinations import is_loopback
from relay.config.loader import Problem, Settings, SettingsError
from relay.config.model import SmtpSettings
from relay.daemon.retired_destinations import RetiredDestinations
from relay.daemon.supervisor import Child, Supervisor, Vitals
from relay.ledger import changes, registry
from relay.ledger.continuity import Continuity
from relay.mail import encryption, record
from relay.mail.destination import Destination
from relay.mail.text import printable
from relay.monitoring import status_server
from relay.monitoring.probes import probe_redis
from relay.redisio import aof, embedded
from relay.redisio.clients import sync_client
from relay.server import relay_process, systemd
from relay.server.relay_process import Place

if TYPE_CHECKING:
    from relay import metric_store
    from workers.upkeep.housekeeping import Task

_PATIENCE = 10.0  # seconds for a Redis that is being started beside us
_SPOOL_PATIENCE = 2.0  # with a spool, mail need not wait for it
_REPORT_EVERY = 3.0
_UNCHANGED_SECONDS = 60.0  # to load a large log in vain takes minutes of a processor

# What is stopped first has the lowest number: no new mail, then no delivery, then what both need.
_RELAY, _WORKERS, _AROUND, _REDIS = range(4)


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


def run(settings: Settings, role: Role, extra: Sequence[Child] = ()) -> int:
    """Start everything, keep it running until a signal, drain. Returns the exit status.

    Raises StartError, and SettingsError where systemd has bound other addresses than they name.
    """
    maillog.configure(settings.log.level, settings.log.format, f"smtp-dup-{role.name}", threads=False)
    try:
        encryption.use(settings.storage.key_file)
        record.bound(settings.smtp.max_message_bytes)
    except encryption.BadKeyFile as error:
        raise StartError(f"storage.key_file: {error}") from error
    settings = _fitted(settings, role)
    early = EarlyStop()
    with ExitStack() as ends:
        _make_state_dir(settings.state_dir)
        _take(settings.state_dir, role, ends)
        arena = _arena(f"smtp-dup-{role.name}")
        try:
            places = relay_process.listen(settings) if role.relays else []
            listener = status_server.bind(settings)
        except systemd.NotAsSet as error:
            raise SettingsError([Problem("smtp.listen", "socket activation", str(error))]) from error
        except OSError as error:
            raise StartError(str(error)) from error
        url, children = _redis(settings, role, ends)
        settings = replace(settings, redis=settings.redis.at(url))
        _warn_of_lost_promises(settings, url)
        listening = [s for place in places for s in place.sockets] + ([listener] if listener else [])

        def holding(child: Child, own: Sequence[socket.socket] = ()) -> Child:
            return _counting(arena, _holding(own, listening, child))

        continuity = Continuity(settings.backups, settings.state_dir, replicas=settings.redis.replicas)
        _register(settings, continuity, role)
        if role.delivers:
            children += [holding(child) for child in _workers(settings, settings.backups, url)]
        vitals = Vitals()
        tasks = _sweeping(settings, url) if role.delivers else {}
        if listener:
            tasks["status"] = _status(
                settings, listener, url, places, arena, vitals, "relay-" if role.relays else "worker-"
            )
        if tasks:
            children.append(holding(_housekeeping(settings, tasks), [listener] if listener else []))
        children += [holding(_relay(n, settings, p, url), p.sockets) for n, p in enumerate(places)]
        children += [holding(child) for child in extra]
        early.check()
        roster = RetiredDestinations(settings, _further(settings, url, holding) if role.delivers else None, continuity)
        status_code = Supervisor(children, on_ready=lambda: _tell(settings, role), roster=roster, vitals=vitals).run()
        early.end()
        return status_code


def _tell(settings: Settings, role: Role) -> None:
    if role.relays and settings.primary:
        for address in settings.smtp.listen.split(","):
            maillog.notice("info", "listening", smtp=address.strip(), processes=settings.smtp.process_count)
        maillog.notice("info", "primary", address=settings.primary.address)
        _tell_who_is_let_in(settings.smtp)
    for backup in settings.backups:
        maillog.notice("info", "backup", name=backup.name, address=backup.address)
    if not settings.backups:
        maillog.notice("warning", "no backup is configured: mail is relayed, nothing is copied")
    if settings.status.listen:
        maillog.notice("info", "status", address=f"http://{settings.status.listen}")


def _tell_who_is_let_in(smtp: SmtpSettings) -> None:
    """Say it where somebody listens to the world and hears nobody."""
    addresses = smtp.addresses + smtp.tls_addresses
    public = smtp.proxy_protocol or any(not is_loopback(host) for host, _ in addresses)
    if public and smtp.users_file is None and all(network.is_loopback for network in smtp.allowed_networks):
        maillog.notice(
            "warning",
            "only clients on this machine are let in: set smtp.allowed_networks to your clients' networks "
            "(or smtp.users_file, for clients that log in)",
            listening=smtp.listen,
        )


# What is needed first ------------------------------------------------------------------------------------------


def _fitted(settings: Settings, role: Role) -> Settings:
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


def _make_state_dir(folder: Path) -> None:
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
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
        (folder / "metrics").rmdir()


def _take(state_dir: Path, role: Role, ends: ExitStack) -> None:
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


def _arena(name: str) -> metric_store.Arena | None:
    """Return where all processes count, us among them; metrics are never a reason not to start."""
    from relay import metric_store, metrics  # noqa: F401, PLC0415  (what counts must be there before we take our place)

    try:
        arena = metric_store.Arena()
    except (OSError, ValueError) as error:
        maillog.notice("warning", "no memory for the metrics: there are none", reason=str(error))
        return None
    arena.reserve(name)
    arena.take(name)
    return arena


def _redis(settings: Settings, role: Role, ends: ExitStack) -> tuple[str, list[Child]]:
    """See that a Redis answers, our own where none is named. Returns its URL, and the child that it is."""
    if settings.redis.url:
        _wait_for_redis(settings, may_be_away=role.relays and settings.spool.dir is not None)
        return settings.redis.url, []
    if role is not UP:
        raise StartError(f"redis.url must be set for `smtp-dup {role.name}`: only `smtp-dup up` starts a Redis itself")
    private = _Private(settings.state_dir)
    try:
        private.prepare()
    except embedded.DataTrouble as error:
        if settings.spool.dir is None:
            raise
        text = "the embedded Redis cannot be started: mail goes on, copies go to the spool until its data are mended"
        maillog.notice("error", text, reason=printable(str(error)))
    ends.callback(private.abandon)
    child = Child("redis", launch=private.launch, release=private.release, stage=_REDIS, may_be_late=True)
    return embedded.url(settings.state_dir), [child]


class _Private:
    """The embedded Redis: first started before the supervisor, so that what keeps it from starting is told at once."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._first: embedded.EmbeddedRedis | None = None
        self._trouble: embedded.DataTrouble | None = None
        self._seen: object = None  # the data with which that was so
        self._tried = 0.0  # monotonic

    def prepare(self) -> None:
        self._first = self._start()

    def launch(self) -> subprocess.Popen[bytes]:
        first, self._first = self._first, None
        return first or self._start()

    def abandon(self) -> None:
        """Stop it, if no supervisor has taken it over; one that had has ended it by now."""
        if self._first:
            embedded.stop(self._first)
            self._first = None
        embedded.remove_socket_folder(self._state_dir)

    @staticmethod
    def release(process: subprocess.Popen[bytes]) -> None:
        """Give its lock back."""
        if isinstance(process, embedded.EmbeddedRedis):
            process.release()

    def _start(self) -> embedded.EmbeddedRedis:
        """Start it and wait for it. With data that no server could use: when they have changed, else once a minute."""
        data = embedded.folder(self._state_dir)
        is_early = time.monotonic() - self._tried < _UNCHANGED_SECONDS
        if self._trouble is not None and is_early and self._seen == aof.fingerprint(data):
            raise self._trouble
        self._trouble, self._tried = None, time.monotonic()
        try:
            return self._try()
        except embedded.DataTrouble as error:
            self._trouble, self._seen = error, aof.fingerprint(data)
            raise

    def _try(self) -> embedded.EmbeddedRedis:
        process = embedded.start(self._state_dir)
        try:
            embedded.wait_ready(self._state_dir, process=process)
        except BaseException:
            embedded.stop(process)
            raise
        return process


def _wait_for_redis(settings: Settings, *, may_be_away: bool) -> None:
    server, subject = settings.redis, "redis.sentinels" if settings.redis.sentinels else "redis.url"
    patience = _SPOOL_PATIENCE if may_be_away else _PATIENCE
    deadline = time.monotonic() + patience
    report = time.monotonic()
    with sync_client(server, min(server.timeout_seconds, patience), retries=0) as client:
        while True:
            try:
                client.ping()
            except (AuthenticationError, ResponseError) as error:
                raise StartError(f"{subject}: {server.shown} cannot be used: {printable(str(error))}") from error
            except (NoConnection, NoAnswer) as error:  # loading is one of them
                reason = printable(str(error))
                if time.monotonic() >= deadline and may_be_away:
                    text = "Redis does not answer: starting without it, copies go to the spool"
                    maillog.notice("warning", text, redis=server.shown, reason=reason)
                    return
                if time.monotonic() >= deadline:
                    raise NoRedis(f"{subject}: {server.shown} does not answer: {reason}") from error
                if time.monotonic() >= report:
                    maillog.notice("warning", "waiting for Redis", redis=server.shown, reason=reason)
                    report += _REPORT_EVERY
                time.sleep(0.2)
            else:
                return


def _warn_of_lost_promises(settings: Settings, url: str) -> None:
    for finding in asyncio.run(probe_redis(settings, url)):
        if not finding.ok:
            text = "a copy may be lost" if finding.subject.startswith("redis") else "a failover may not work"
            maillog.notice("warning", text, about=finding.subject, finding=finding.text)


def _register(settings: Settings, continuity: Continuity, role: Role) -> None:
    """See whether the ledger is the one that we knew, before anybody delivers, and make the backups known to it."""
    try:
        with sync_client(settings.redis, settings.redis.timeout_seconds, retries=0) as client:
            if role.delivers:
                with client.pipeline() as pipe:
                    registry.register(pipe, settings.backups)
                    pipe.execute()
            continuity.look(client)
    except RedisError as error:
        if settings.spool.dir is None and role.delivers:
            raise NoRedis(f"redis: {printable(str(error))}") from error
        maillog.notice("warning", "the ledger does not hear of the backups", reason=printable(str(error)))


# The children --------------------------------------------------------------------------------------------------


def _holding(own: Sequence[socket.socket], listening: Sequence[socket.socket], child: Child) -> Child:
    """Have a child close all listening sockets but its own, which it was forked with.

    Kept open they would take connections that nobody accepts, once their process has ended, and a child that drains
    while its supervisor is dead would keep the port from the next start.
    """
    run = child.run
    if run is None:  # a program: sockets are not inherited
        return child

    def run_apart(context: ChildContext) -> int:
        for sock in listening:
            if sock not in own:
                sock.close()
        return run(context)

    return replace(child, run=run_apart)


def _counting(arena: metric_store.Arena | None, child: Child) -> Child:
    """Have a child count where whoever had its name before has counted."""
    run = child.run
    if run is None or arena is None:
        return child
    arena.reserve(child.name)

    def run_counted(context: ChildContext) -> int:
        arena.take(context.name)
        return run(context)

    return replace(child, run=run_counted)


def _relay(number: int, settings: Settings, place: Place, url: str) -> Child:
    def be_relay(context: ChildContext) -> int:
        return relay_process.serve(context, settings, place, url)

    return Child(f"relay-{number + 1}", run=be_relay, stage=_RELAY)


def _workers(settings: Settings, destinations: Sequence[Destination], url: str) -> list[Child]:
    from workers.delivery import courier, retry  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)
    from workers.rqworker import worker_process  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    limit = limits.files()

    def fitted(destination: Destination) -> Destination:
        wanted = retry.Width(destination.connections).most
        fits = limits.worker_connections(limit, wanted)
        return destination if fits == wanted else replace(destination, connections=fits)

    def child(destination: Destination, number: int) -> Child:
        def give_back(connection: Redis, dead: str) -> None:
            changes.release_leases(connection, destination.name, dead)

        def be_worker(context: ChildContext) -> int:
            maillog.configure(settings.log.level, settings.log.format, context.name, threads=True)
            return worker_process.serve(
                context,
                destination=destination.name,
                queue_name=destination.queue_name,
                connect=worker_process.connector(settings.redis),
                make_courier=lambda name: courier.Courier(settings, fitted(destination), name, url),
                on_dead=give_back,
            )

        return Child(f"worker-{destination.name}-{number}", run=be_worker, stage=_WORKERS)

    return [child(d, n) for d in destinations for n in range(1, settings.workers.processes + 1)]


def _further(
    settings: Settings, url: str, holding: Callable[[Child], Child]
) -> Callable[[Destination], Sequence[Child]]:
    """Return what makes the workers of a destination that is not in the settings."""
    return lambda destination: [holding(child) for child in _workers(settings, [destination], url)]


def _housekeeping(settings: Settings, tasks: Mapping[str, Task]) -> Child:
    from workers.upkeep.housekeeping import housekeep  # noqa: PLC0415  (only where something is to be run)

    def be_housekeeping(context: ChildContext) -> int:
        maillog.configure(settings.log.level, settings.log.format, context.name, threads=True)
        return housekeep(tasks)

    return Child("housekeeping", run=be_housekeeping, stage=_AROUND)


def _sweeping(settings: Settings, url: str) -> dict[str, Task]:
    from workers.rqworker.scheduler import keep_scheduling  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)
    from workers.rqworker.worker_process import connector  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)
    from workers.upkeep.reconciler import keep_reconciling  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    # Stable, so that the next start goes on with the locks instead of waiting for their end.
    name = relay_process.place_of(settings, url)

    def schedule(stop: threading.Event) -> None:
        connect = connector(settings.redis)
        with connect() as client:
            keep_scheduling(connect, _queues(client, settings.backups), name, stop)

    def reconcile(stop: threading.Event) -> None:
        keep_reconciling(connector(settings.redis), settings, name, stop, every=settings.workers.sweep)

    return {"scheduler": schedule, "reconciler": reconcile}


def _status(
    settings: Settings,
    listener: socket.socket,
    url: str,
    places: Sequence[Place],
    arena: metric_store.Arena | None,
    vitals: Vitals,
    prefix: str,
) -> Task:
    seat = places[0].counters if places else None
    return lambda stop: status_server.serve(
        settings, listener, url, arena, stop, seat=seat, failing=lambda: vitals.failing(prefix)
    )


def _queues(client: Redis, configured: Sequence[Destination]) -> Callable[[], list[str]]:
    """Return what names the queues: also those of a destination that another host's relay has made known."""

    def names() -> list[str]:
        known = registry.destinations(client).values()
        return sorted({d.queue_name for d in (*configured, *known)})

    return names
