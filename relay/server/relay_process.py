"""One relay process: the context of its command loops, and its life from the first accept to the drain.

``serve`` runs it, on the sockets of its place (``listening``). Wiring only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from dataclasses import replace
from functools import partial
from typing import Any

import uvloop
from redis.exceptions import RedisError

from relay import limits, log_lines, log_output, maillog
from relay.child import ChildContext, keep_living_in_loop
from relay.client.pool import Pool
from relay.config.loader import Settings
from relay.handover.handover import Handover
from relay.ledger import recovery, registry
from relay.ledger.continuity import Continuity
from relay.ledger.greetings import Greetings
from relay.ledger.hosts import place_of
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail import encryption
from relay.mail.destination import Destination
from relay.mail.ids import IdSource
from relay.redisio.clients import async_client, sync_client
from relay.server import background
from relay.server.follower import Follower
from relay.server.listening import Place
from relay.server.routes_in_use import RoutesInUse
from relay.smtpd import commands
from relay.smtpd.context import Context
from relay.smtpd.credentials import Credentials
from relay.smtpd.primary import Primary
from relay.smtpd.staging import Staging
from relay.spool.importer import Importer
from relay.spool.writer import Spool
from relay.topology import heartbeats
from relay.topology.heartbeats import Pulse
from relay.trace import emitter

_LOOK_SECONDS = 0.05
_MONITOR_SECONDS = 1.0
_SOON = 0.2  # seconds between two looks while mailboxes are being moved
_INTRODUCTION_SECONDS = 1.0
_IMPORT_SECONDS = 5.0  # for the importer's current batch when the process stops
_GRACE_SECONDS = 30.0  # while draining, for clients that have not sent all of their message
LEAVE = signal.SIGUSR2  # sent to a process after one with newer settings has replaced it


def serve(context: ChildContext, settings: Settings, place: Place, redis_url: str) -> int:
    """Run one relay process until SIGTERM (the ``run`` of a supervisor's child). Returns the exit status."""
    log_lines.configure(settings.log.level, settings.log.format, context.name, threads=True)
    place = replace(place, counters=place.counters.at_seat(context.seat))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Relay(context, settings, place, redis_url).run())
    log_output.gather(None)
    return 0


class _Relay:
    def __init__(self, context: ChildContext, settings: Settings, place: Place, redis_url: str) -> None:
        self._context = context
        self._settings = settings
        self._redis_url = redis_url
        self._place = place
        seconds = settings.redis.timeout_seconds
        server = settings.redis.at(redis_url)
        self._redis = async_client(server, seconds, confirmed=True)
        self._probe = async_client(server, seconds)
        self._greetings = Greetings(self._probe)
        self._bulk = async_client(server, max(seconds, 30.0), confirmed=True)
        self._jobs = sync_client(server, seconds)
        self._dispatcher = Dispatcher(
            self._redis, processes=settings.smtp.process_count, job_size=settings.workers.job_size
        )
        self._continuity = Continuity(settings.copied, settings.state_dir, replicas=settings.redis.replicas)
        self._pulse = Pulse(place_of(settings.state_dir, redis_url), context.name, os.getpid())
        self._pulse.generation = context.generation
        self._follower = Follower(settings, self._pulse, self._primary)
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
                destinations=settings.copied,
                hold_seconds=settings.relay.uncertain_hold,
            )
        self._handover = Handover(settings.state_dir if settings.workers.first_try_from_memory else None, redis_url)
        self._staging = Staging(
            self._redis,
            self._bulk,
            self._dispatcher,
            self._watch,
            stage_seconds=seconds,
            deadline_seconds=settings.relay.final_timeout_seconds + 30,
            hold_seconds=settings.relay.uncertain_hold,
            spool=self._spool,
            awaits_release=settings.relay.await_release,
            handover=self._handover,
            covering=lambda released: asyncio.to_thread(recovery.tell_of_repeats, self._jobs, released),
        )
        self._shared = Context(
            settings=settings,
            snapshot=self._follower.begin(),
            staging=self._staging,
            ids=ids,
            counters=place.counters,
            credentials=Credentials.load(settings.smtp),
        )
        self._follower.serve(self._shared)
        self._routes = RoutesInUse(settings, self._shared, self._follower, self._pulse, self._jobs, self._primary)
        smtp = settings.smtp
        addresses = len(smtp.addresses + smtp.tls_addresses)
        self._fit = limits.relay_fit(limits.files(), smtp.max_connections, smtp.process_count, addresses)
        self._shared.most_clients = self._fit.clients_here
        self._stop = asyncio.Event()
        self._introductions = asyncio.Event()
        self._beside: frozenset[str] = frozenset()  # living instances of this place, at the last introduction

    def _primary(self, destination: Destination) -> Primary:
        """Return a server as the primary, with a pool of its own."""
        settings = self._settings
        share = max(1, math.ceil(settings.smtp.max_connections / settings.smtp.process_count))
        timeouts, final = settings.relay.timeouts, settings.relay.final_timeout_seconds
        pool = Pool(
            destination,
            local_hostname=settings.smtp.domain,
            timeouts=timeouts,
            limit=share,
            on_open=self._greetings.note,
        )
        return Primary(destination, pool, timeouts=timeouts, final_timeout=final)

    async def run(self) -> None:
        """Start up, serve, drain."""
        loop = asyncio.get_running_loop()
        emitter.use(loop)
        log_output.gather(loop.call_soon)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(LEAVE, self._leave)
        self._living = loop.create_task(keep_living_in_loop(self._context.lives))  # to the loop's end
        self._place.counters.take()
        self._reload_keys()
        with contextlib.suppress(OSError):  # a SIGHUP that came before its handler has told us nothing
            self._shared.credentials = Credentials.load(self._settings.smtp)
        if self._spool:
            try:
                await self._spool.open()
            except OSError as error:  # opened again when it is needed
                maillog.spool_trouble("start", error)
        monitor = background.start(self._monitor)
        with contextlib.suppress(TimeoutError):
            # A Redis that is down must not delay the primary leg for long.
            await asyncio.wait_for(self._introductions.wait(), _INTRODUCTION_SECONDS)
        importing = background.start(self._importer.run) if self._importer else None
        handing = background.start(self._handover.follow)
        await self._routes.begin()
        await self._hear_the_primary()
        servers = []
        for n, sock in enumerate(self._place.sockets):
            take = partial(commands.take, self._shared, tls=n >= self._place.plain)
            servers.append(await loop.create_server(take, sock=sock, backlog=self._fit.backlog))
        maillog.started("relay", pid=os.getpid(), listen=self._settings.smtp.listen, owner=self._shared.ids.owner)
        self._context.ready()
        await self._stop.wait()
        maillog.stopping("relay", clients=len(self._shared.command_loops))
        self._shared.stopping = True
        # Sockets shared with a successor go on listening: it accepts the connections that wait there.
        for sock in self._place.sockets if self._place.ours and not self._shared.leaving else ():
            with contextlib.suppress(OSError):
                # The supervisor holds it too: only shutdown() refuses new clients at once. On systemd's they wait.
                sock.shutdown(socket.SHUT_RDWR)
        for server in servers:
            server.close()
        await self._drain(importing)
        await background.end(handing)
        self._handover.close()
        await background.end(monitor)
        if not self._shared.leaving:
            with contextlib.suppress(RedisError, OSError):  # if this fails, the heartbeat expires
                await asyncio.to_thread(heartbeats.forget, self._jobs, self._pulse.process)
        await self._follower.close()
        await self._routes.end()
        await self._shared.snapshot.primary.pool.close()
        if self._spool:
            await self._spool.close()
        for client in (self._redis, self._bulk, self._probe):
            await client.aclose()
        self._jobs.close()
        emitter.flush()
        maillog.stopped("relay")

    async def _hear_the_primary(self) -> None:
        """Wait for the primary's EHLO, or those of all, as long as nobody tells us to stop: it may be silent."""
        snapshot, primaries = self._shared.snapshot, self._shared.route_primaries
        greeting = primaries.hear_all(snapshot) if primaries is not None else snapshot.primary.announced()
        waits: set[asyncio.Task[Any]] = {asyncio.create_task(greeting), asyncio.create_task(self._stop.wait())}
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()

    def _end(self) -> None:
        self._shared.leaving = False
        self._stop.set()

    def _leave(self) -> None:
        """Stop accepting clients and let the connected ones finish: a process with newer settings replaces this one."""
        if not self._stop.is_set():
            self._watch.look_alone()  # the successor sends the heartbeat of this place now
            self._shared.leaving = True
            self._stop.set()

    def _reload(self) -> None:
        """Read certificate, users and keys again, for new connections; a file that cannot be used changes nothing."""
        try:
            self._shared.credentials = Credentials.load(self._settings.smtp)
        except OSError as error:
            maillog.notice("error", "not reloaded", reason=str(error))
        else:
            maillog.notice("info", "certificate and users reloaded")
        self._reload_keys()
        self._routes.reload()

    @staticmethod
    def _reload_keys() -> None:
        """Read the key file again; also at the start, since the supervisor may have read it long before the fork."""
        try:
            encryption.reload()
        except encryption.BadKeyFile as error:
            maillog.notice("error", "not reloaded", reason=f"storage.key_file: {error}")
        else:
            if (ring := encryption.ring()) is not None:
                maillog.notice("info", "storage.key_file", mail=ring.words)

    async def _introduce(self) -> None:
        """Register this process and its destinations in the ledger; take over what dead predecessors had staged."""
        me = f"{place_of(self._settings.state_dir, self._redis_url)} {self._context.name}"
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                registry.register(pipe, (*self._settings.copied, *self._follower.copied))
                await pipe.execute()
            await asyncio.to_thread(self._continuity.register, self._jobs)
            self._watch.is_stranger = False
            living = self._context.living()
            if living is None:  # unknown; tried again in a moment
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
        """Whether another process of this place has ended; if it was killed, staged messages may need a takeover."""
        return bool(self._beside - (self._context.living() or self._beside))

    async def _monitor(self) -> None:
        """Watch Redis, and introduce this process whenever Redis does not know it or a neighbour has ended."""
        while True:
            self._routes.tell()
            if await self._watch.look():
                self._routes.moved.follow()
                await self._follower.follow(self._redis)
                if self._watch.is_stranger or not self._introductions.is_set() or self._has_lost_somebody:
                    await self._introduce()
            await self._follower.pause(_SOON if self._routes.moved.is_busy else _MONITOR_SECONDS)

    async def _drain(self, importing: asyncio.Task[None] | None) -> None:
        """Let sessions finish within ``_GRACE_SECONDS``; after the end of data, whenever the primary answers."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + _GRACE_SECONDS
        if self._importer:
            self._importer.stop()
        await asyncio.sleep(_LOOK_SECONDS)  # whom the kernel has handed over last has a command loop by then
        while self._shared.command_loops:
            for client in list(self._shared.command_loops):
                client.stop(impatient=loop.time() > patience)
            await asyncio.sleep(_LOOK_SECONDS)
        await self._staging.drain()
        if importing:
            await asyncio.wait({importing}, timeout=_IMPORT_SECONDS)
            await background.end(importing)
