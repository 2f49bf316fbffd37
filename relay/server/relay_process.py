"""One relay process: its sockets, what its command loops share, its life from the first accept to the drain.

``listen`` binds for all processes in the supervisor, so that a port in use is one clear error at the start
and a crashed process leaves no refused connection behind. ``serve`` is the run of one of them. Wiring only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import uvloop
from redis.exceptions import RedisError

from relay import limits, maillog
from relay.child import ChildContext
from relay.client.pool import Pool
from relay.config.loader import Settings
from relay.ledger import recovery, registry
from relay.ledger.continuity import Continuity
from relay.ledger.greetings import Greetings
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail import encryption
from relay.mail.ids import IdSource
from relay.redisio.clients import async_client, sync_client
from relay.server import systemd
from relay.smtpd import commands
from relay.smtpd.context import Context
from relay.smtpd.credentials import Credentials
from relay.smtpd.primary import Primary
from relay.smtpd.shared_counters import ProcessCounters, SharedCounters
from relay.smtpd.staging import Staging
from relay.spool.importer import Importer
from relay.spool.writer import Spool
from relay.topology import heartbeats
from relay.topology.heartbeats import Pulse

_BACKLOG = 1024  # until the relay process, which knows what fits, sets its own
# The kernel has none, it is disabled, or the interface has no such address.
_NO_IPV6 = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT}
_POOL_WAIT = 0.05
_MONITOR_SECONDS = 1.0
_INTRODUCTION_SECONDS = 1.0
_IMPORT_SECONDS = 5.0  # for the batch in hand when we stop
_GRACE_SECONDS = 30.0  # for clients between commands of a transaction while we drain
LEAVE = signal.SIGUSR2  # to a process that another one of newer settings has taken the place of


@dataclass(frozen=True, slots=True)
class Place:
    """What one relay process gets from the supervisor: its sockets, and its counters beside those of the others."""

    sockets: Sequence[socket.socket]
    counters: ProcessCounters
    plain: int  # so many of the sockets are plain at first; the others begin with TLS
    ours: bool = True  # bound by us; else systemd's, which go on listening when we end


def listen(settings: Settings) -> list[Place]:
    """Bind every listening address once per relay process, or share what systemd has bound among all of them.

    Raises OSError with the setting or address in its text, and passed.NotAsSet.
    """
    Credentials.load(settings.smtp)  # each process loads them again; what is wrong with them must show here
    plain = [found for host, port in settings.smtp.addresses for found in _resolve(host, port)]
    tls = [found for host, port in settings.smtp.tls_addresses for found in _resolve(host, port)]
    if from_systemd := systemd.take(os.environ):
        sockets, plain_count = systemd.match(from_systemd, plain, tls)
        return [Place(sockets, counters, plain_count, ours=False) for counters in _counters(settings)]
    plain = [found for host, port in settings.smtp.addresses for found in _usable(host, port)]
    tls = [found for host, port in settings.smtp.tls_addresses for found in _usable(host, port)]
    addresses = plain + tls
    return [
        Place([_bind(family, address, share=True) for family, address in addresses], counters, len(plain))
        for counters in _counters(settings)
    ]


def _counters(settings: Settings) -> list[ProcessCounters]:
    count = settings.smtp.process_count
    counters = SharedCounters(count)
    return [counters.of_process(n) for n in range(count)]


def _resolve(host: str, port: int) -> list[systemd.Address]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"smtp.listen: {host}:{port}: {error.strerror or error}") from error
    unique = dict.fromkeys((family, (str(address[0]), port)) for family, _, _, _, address in found)
    return list(unique)


def _usable(host: str, port: int) -> list[systemd.Address]:
    """Return what can be bound of the addresses that a setting stands for. Raises OSError.

    A machine without IPv6, or without an IPv6 address behind a name, listens on what is left, and says so.
    """
    usable: list[systemd.Address] = []
    missing: list[OSError] = []
    for family, address in _resolve(host, port):
        try:
            # SO_REUSEPORT would let a second smtp-dup share the port in silence: one bind without it finds out.
            _bind(family, address, share=False).close()
        except OSError as error:
            if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
                raise
            missing.append(error)
        else:
            usable.append((family, address))
    if missing and not usable:
        raise missing[0]
    for trouble in missing:
        maillog.notice("warning", "listening on IPv4 alone: this machine has no such IPv6 address", reason=str(trouble))
    return usable


def _bind(family: socket.AddressFamily, address: tuple[str, int], *, share: bool) -> socket.socket:
    sock = None
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        if share:
            sock.listen(_BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        text = f"smtp.listen: cannot listen on {address[0]} port {address[1]}: {error.strerror}"
        told = OSError(text)  # with a number as well its text would begin with that
        told.errno = error.errno
        raise told from error
    sock.setblocking(False)
    return sock


def place_of(settings: Settings, redis_url: str) -> str:
    """Return a stable name of where we run: the host, and the state folder, which two installations never share.

    With a Redis on a socket there is one host, whose name may change: a container that is made anew has another.
    """
    host = "" if redis_url.startswith("unix:") else f"{socket.gethostname()} "
    return f"{host}{settings.state_dir.absolute()}"


async def _for_ever(task: Callable[[], Awaitable[None]]) -> None:
    """Run a task of the background again when it fails, until it ends."""
    while True:
        try:
            return await task()
        except Exception as error:  # the border: mail goes on, and so must this
            maillog.task_failed(getattr(task, "__qualname__", "task"), error)
        await asyncio.sleep(_MONITOR_SECONDS)


def serve(context: ChildContext, settings: Settings, place: Place, redis_url: str) -> int:
    """Be one relay process until SIGTERM; the ``run`` of a supervisor's child. Returns the exit status."""
    maillog.configure(settings.log.level, settings.log.format, context.name, threads=True)
    place = replace(place, counters=place.counters.at_seat(context.seat))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Relay(context, settings, place, redis_url).run())
    return 0


class _Relay:
    def __init__(self, context: ChildContext, settings: Settings, place: Place, redis_url: str) -> None:
        if settings.primary is None:
            raise ValueError("a relay needs a primary")
        self._context = context
        self._settings = settings
        self._redis_url = redis_url
        self._place = place
        seconds = settings.redis.timeout_seconds
        share = max(1, math.ceil(settings.smtp.max_connections / settings.smtp.process_count))
        server = settings.redis.at(redis_url)
        self._redis = async_client(server, seconds, confirmed=True)
        self._probe = async_client(server, seconds)
        pool = Pool(
            settings.primary,
            local_hostname=settings.smtp.domain,
            timeouts=settings.relay.timeouts,
            limit=share,
            on_open=Greetings(self._probe).note,
        )
        self._bulk = async_client(server, max(seconds, 30.0), confirmed=True)
        self._jobs = sync_client(server, seconds)
        self._dispatcher = Dispatcher(
            self._redis, processes=settings.smtp.process_count, job_size=settings.workers.job_size
        )
        self._pool = pool
        self._continuity = Continuity(settings.backups, settings.state_dir, replicas=settings.redis.replicas)
        self._pulse = Pulse(place_of(settings, redis_url), context.name, os.getpid())
        self._pulse.generation = context.generation
        self._watch = Monitor(
            self._probe,
            seconds=seconds,
            processes=settings.smtp.process_count,
            replicas=server.replicas,
            continuity=self._continuity,
            errand=self._pulse,
        )
        ids = IdSource()
        folder = settings.spool.dir
        self._spool = Spool(folder, ids.owner, settings.spool.min_free) if folder else None
        self._importer: Importer | None = None
        if folder:
            self._importer = Importer(
                folder,
                self._bulk,
                self._dispatcher,
                self._watch,
                destinations=settings.backups,
                hold_seconds=settings.relay.uncertain_hold,
            )
        self._staging = Staging(
            self._redis,
            self._bulk,
            self._dispatcher,
            self._watch,
            stage_seconds=seconds,
            deadline_seconds=settings.relay.final_timeout_seconds + 30,
            hold_seconds=settings.relay.uncertain_hold,
            spool=self._spool,
        )
        self._shared = Context(
            settings=settings,
            primary=Primary(
                settings.primary,
                pool,
                timeouts=settings.relay.timeouts,
                final_timeout=settings.relay.final_timeout_seconds,
            ),
            staging=self._staging,
            ids=ids,
            counters=place.counters,
            credentials=Credentials.load(settings.smtp),
        )
        smtp = settings.smtp
        addresses = len(smtp.addresses + smtp.tls_addresses)
        self._fit = limits.relay_fit(limits.files(), smtp.max_connections, smtp.process_count, addresses)
        self._shared.most_clients = self._fit.clients_here
        self._stop = asyncio.Event()
        self._introductions = asyncio.Event()
        self._beside: frozenset[str] = frozenset()  # the instances at our place, as we last saw them

    async def run(self) -> None:
        """Start up, serve, drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(LEAVE, self._leave)
        self._place.counters.take()
        self._reload_keys()
        if self._spool:
            try:
                await self._spool.open()
            except OSError as error:  # tried again when it is needed
                maillog.spool_trouble("start", error)
        monitor = loop.create_task(_for_ever(self._monitor))
        with contextlib.suppress(TimeoutError):
            # A Redis that is away must not keep us from the primary leg for long.
            await asyncio.wait_for(self._introductions.wait(), _INTRODUCTION_SECONDS)
        importing = loop.create_task(_for_ever(self._importer.run)) if self._importer else None
        await self._shared.primary.announced()
        servers = []
        for n, sock in enumerate(self._place.sockets):
            take = partial(commands.take, self._shared, tls=n >= self._place.plain)
            servers.append(await loop.create_server(take, sock=sock, backlog=self._fit.backlog))
        maillog.started("relay", pid=os.getpid(), listen=self._settings.smtp.listen, owner=self._shared.ids.owner)
        self._context.ready()
        await self._stop.wait()
        maillog.stopping("relay", clients=len(self._shared.command_loops))
        self._shared.stopping = True
        # Those that are shared with our successor go on listening: it takes what waits there.
        for sock in self._place.sockets if self._place.ours and not self._shared.leaving else ():
            with contextlib.suppress(OSError):
                # The supervisor holds it too: only a shutdown has new clients refused at once. At systemd's they wait.
                sock.shutdown(socket.SHUT_RDWR)
        for server in servers:
            server.close()
        await self._drain(importing)
        monitor.cancel()
        if not self._shared.leaving:
            with contextlib.suppress(RedisError, OSError):  # then it counts as dead before long
                await asyncio.to_thread(heartbeats.forget, self._jobs, self._pulse.process)
        await self._pool.close()
        if self._spool:
            await self._spool.close()
        for client in (self._redis, self._bulk, self._probe):
            await client.aclose()
        self._jobs.close()
        maillog.stopped("relay")

    def _end(self) -> None:
        self._shared.leaving = False
        self._stop.set()

    def _leave(self) -> None:
        """Take no more clients, and let those that are here finish: a process with newer settings takes them."""
        if not self._stop.is_set():
            self._watch.look_alone()  # the sign of life at our place is our successor's
            self._shared.leaving = True
            self._stop.set()

    def _reload(self) -> None:
        """Read certificate, users and keys again, for what is to come; what cannot be used changes nothing."""
        try:
            self._shared.credentials = Credentials.load(self._settings.smtp)
        except OSError as error:
            maillog.notice("error", "not reloaded", reason=str(error))
        else:
            maillog.notice("info", "certificate and users reloaded")
        self._reload_keys()

    @staticmethod
    def _reload_keys() -> None:
        """Read the key file again. Also at our start: the supervisor that forked us read it once, perhaps long ago."""
        try:
            encryption.reload()
        except encryption.BadKeyFile as error:
            maillog.notice("error", "not reloaded", reason=f"storage.key_file: {error}")
        else:
            if (ring := encryption.ring()) is not None:
                maillog.notice("info", "storage.key_file", mail=ring.words)

    async def _introduce(self) -> None:
        """Tell the ledger who we are and where copies go; take over what our dead predecessors had staged."""
        me = f"{place_of(self._settings, self._redis_url)} {self._context.name}"
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                registry.register(pipe, self._settings.backups)
                await pipe.execute()
            await asyncio.to_thread(self._continuity.register, self._jobs)
            self._watch.is_stranger = False
            living = self._context.living()
            if living is None:  # asked again in a moment
                return
            await asyncio.to_thread(
                recovery.take_over,
                self._jobs,
                me,
                self._shared.ids.owner,
                self._settings.relay.uncertain_hold,
                self._settings.workers.job_size,
                instance=self._context.instance,
                living=living,
            )
            siblings = [f"relay-{n + 1}" for n in range(self._settings.smtp.process_count)]
            await asyncio.to_thread(heartbeats.forget, self._jobs, self._pulse.process, siblings)
            self._beside = living
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("start of a relay process", error)
            return
        self._introductions.set()

    @property
    def _has_lost_somebody(self) -> bool:
        """Whether a process of other settings at our place has ended: it may have left something, if it was killed."""
        return bool(self._beside - (self._context.living() or self._beside))

    async def _monitor(self) -> None:
        """Look how Redis is, and introduce us as soon as it answers."""
        while True:
            if await self._watch.look() and (
                self._watch.is_stranger or not self._introductions.is_set() or self._has_lost_somebody
            ):
                await self._introduce()
            await asyncio.sleep(_MONITOR_SECONDS)

    async def _drain(self, importing: asyncio.Task[None] | None) -> None:
        """Let what is in flight finish: a client that only thinks has some seconds, one in DATA its deadline."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + _GRACE_SECONDS
        if self._importer:
            self._importer.stop()
        while self._shared.command_loops:
            for client in list(self._shared.command_loops):
                client.stop(impatient=loop.time() > patience)
            await asyncio.sleep(_POOL_WAIT)
        await self._staging.drain()
        if importing:
            await asyncio.wait({importing}, timeout=_IMPORT_SECONDS)
            importing.cancel()
