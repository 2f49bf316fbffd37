"""One relay process: its sockets, what its sessions share, its life from the first accept to the drain.

``listen`` binds for all processes in the supervisor, so that a port in use is one clear error at the start
and a crashed process leaves no refused connection behind. ``serve`` is the run of one of them. Wiring only.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import redis.asyncio
import uvloop
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from relay import ledger, maillog
from relay.dispatch import Dispatcher
from relay.envelope import IdSource
from relay.intake import Intake
from relay.occupancy import Occupancy, Seat
from relay.pool import Pool
from relay.primary import Primary
from relay.processes import ChildContext
from relay.session import Front, Session
from relay.settings import Settings

_BACKLOG = 1024
_POOL_WAIT = 0.05
_MONITOR_SECONDS = 1.0
_GRACE_SECONDS = 30.0  # for clients between commands of a transaction while we drain


@dataclass(frozen=True, slots=True)
class Place:
    """What one relay process gets from the supervisor: its sockets, and its seat among the others."""

    sockets: Sequence[socket.socket]
    seat: Seat


def listen(settings: Settings) -> list[Place]:
    """Bind every listening address once per relay process. Raises OSError with the address in its text."""
    addresses = [found for host, port in settings.smtp.addresses for found in _resolve(host, port)]
    for family, address in addresses:
        # SO_REUSEPORT would let a second smtp-dup share the port in silence: one bind without it finds out.
        _bind(family, address, share=False).close()
    count = settings.smtp.process_count
    occupancy = Occupancy(count)
    return [
        Place([_bind(family, address, share=True) for family, address in addresses], occupancy.seat(n))
        for n in range(count)
    ]


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"smtp.listen: {host}:{port}: {error.strerror or error}") from error
    unique = dict.fromkeys((family, (str(address[0]), port)) for family, _, _, _, address in found)
    return list(unique)


def _bind(family: socket.AddressFamily, address: tuple[str, int], *, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        if share:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise OSError(f"smtp.listen: cannot listen on {address[0]} port {address[1]}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def async_client(url: str, seconds: float) -> redis.asyncio.Redis:
    """Return an async Redis client: one silent reconnect, no endless retries, every answer within the time."""
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=Retry(NoBackoff(), 1)
    )


def sync_client(url: str, seconds: float) -> redis.Redis:
    """Return a blocking Redis client under the same rules."""
    return redis.Redis.from_url(
        url, socket_timeout=seconds, socket_connect_timeout=seconds, retry=Retry(NoBackoff(), 1)
    )


def serve(context: ChildContext, settings: Settings, place: Place, redis_url: str) -> int:
    """Be one relay process until SIGTERM; the ``run`` of a supervisor's child. Returns the exit status."""
    maillog.configure(settings.log.level, settings.log.format, context.name)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Relay(context, settings, place, redis_url).run())
    return 0


class _Relay:
    def __init__(self, context: ChildContext, settings: Settings, place: Place, redis_url: str) -> None:
        if settings.primary is None:
            raise ValueError("a relay needs a primary")
        self._context = context
        self._settings = settings
        self._place = place
        seconds = settings.redis.timeout_seconds
        share = max(1, math.ceil(settings.smtp.max_connections / settings.smtp.process_count))
        pool = Pool(
            settings.primary,
            local_hostname=settings.smtp.domain,
            connect_timeout=settings.relay.timeout_seconds,
            limit=share,
        )
        self._redis = async_client(redis_url, seconds)
        self._bulk = async_client(redis_url, max(seconds, 30.0))
        self._jobs = sync_client(redis_url, seconds)
        self._dispatcher = Dispatcher(self._jobs, settings.backups)
        self._pool = pool
        self._intake = Intake(
            self._redis,
            self._bulk,
            self._dispatcher,
            stage_seconds=seconds,
            deadline_seconds=settings.relay.final_timeout_seconds + 30,
            hold_seconds=settings.relay.uncertain_hold,
        )
        self._front = Front(
            settings=settings,
            primary=Primary(
                settings.primary,
                pool,
                timeout=settings.relay.timeout_seconds,
                final_timeout=settings.relay.final_timeout_seconds,
            ),
            intake=self._intake,
            ids=IdSource(),
            seat=place.seat,
        )
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Start up, serve, drain."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, self._stop.set)
        self._place.seat.take()
        await self._introduce()
        monitor = loop.create_task(self._monitor())
        await self._front.primary.announced()
        servers = [
            await loop.create_server(lambda: Session(self._front), sock=sock, backlog=_BACKLOG) for sock in self._place.sockets
        ]
        maillog.started("relay", pid=os.getpid(), listen=self._settings.smtp.listen, owner=self._front.ids.owner)
        await self._stop.wait()
        maillog.stopping("relay", clients=len(self._front.sessions))
        self._front.stopping = True
        for sock in self._place.sockets:
            with contextlib.suppress(OSError):
                # The supervisor holds it too: only a shutdown has new clients refused at once.
                sock.shutdown(socket.SHUT_RDWR)
        for server in servers:
            server.close()
        await self._drain()
        monitor.cancel()
        await self._pool.close()
        await self._redis.aclose()
        await self._bulk.aclose()
        self._jobs.close()
        maillog.stopped("relay")

    async def _introduce(self) -> None:
        """Tell the ledger who we are and where copies go; take over what our dead predecessors had staged."""
        me = f"{socket.gethostname()} {self._settings.state_dir} {self._context.name}"
        destinations = [d for d in (self._settings.primary, *self._settings.backups) if d is not None]
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                ledger.register(pipe, destinations[1:])
                ledger.adopt(pipe, me, self._front.ids.owner, self._settings.relay.uncertain_hold)
                held = (await pipe.execute())[-1]
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("start of a relay process", error)
            return
        self._introduced = True
        for message_id in held:
            maillog.abandoned(message_id.decode(), self._settings.relay.uncertain_hold)

    _introduced = False

    async def _monitor(self) -> None:
        """Keep the clock offset to Redis, and make up for an introduction that Redis missed."""
        while True:
            before = time.time()
            with contextlib.suppress(RedisError, OSError):
                seconds, micros = await self._redis.time()
                self._intake.clock_offset = seconds + micros / 1e6 - (before + time.time()) / 2
                if not self._introduced:
                    await self._introduce()
            await asyncio.sleep(_MONITOR_SECONDS)

    async def _drain(self) -> None:
        """Let the transactions in flight finish; a client that only thinks has some seconds, one in DATA its deadline."""
        loop = asyncio.get_running_loop()
        patience = loop.time() + _GRACE_SECONDS
        while self._front.sessions:
            for session in list(self._front.sessions):
                session.stop(impatient=loop.time() > patience)
            await asyncio.sleep(_POOL_WAIT)
        with contextlib.suppress(TimeoutError):
            await self._intake.drain()
