"""The Redis of a start: one that is named must answer, or our own is started; and the ledger hears of the backups."""

from __future__ import annotations

import asyncio
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import TimeoutError as NoAnswer

from relay import maillog
from relay.config.loader import Settings
from relay.daemon.slots import REDIS_STAGE, Child
from relay.daemon.start import UP, NoRedis, Role, StartError
from relay.ledger import registry
from relay.ledger.continuity import Continuity
from relay.mail.text import printable
from relay.monitoring import promises
from relay.monitoring.probes import probe_redis
from relay.redisio import aof, embedded
from relay.redisio.clients import sync_client

_PATIENCE = 10.0  # seconds for a Redis that is being started beside us
_SPOOL_PATIENCE = 2.0  # with a spool, mail need not wait for it
_REPORT_EVERY = 3.0
_UNCHANGED_SECONDS = 60.0  # to load a large log in vain takes minutes of a processor


def redis_of(settings: Settings, role: Role, ends: ExitStack) -> tuple[str, list[Child]]:
    """See that a Redis answers, our own where none is named. Returns its URL, and the child that it is."""
    if settings.redis.url:
        _wait_for_redis(settings, may_be_away=role.relays and settings.spool.dir is not None)
        return settings.redis.url, []
    if role is not UP:
        raise StartError(f"redis.url must be set for `smtp-dup {role.name}`: only `smtp-dup up` starts a Redis itself")
    private = _Private(settings.state_dir, settings.redis.program)
    try:
        private.prepare()
    except embedded.DataTrouble as error:
        if settings.spool.dir is None:
            raise
        text = "the embedded Redis cannot be started: mail goes on, copies go to the spool until its data are mended"
        maillog.notice("error", text, reason=printable(str(error)))
    ends.callback(private.abandon)
    child = Child("redis", launch=private.launch, release=private.release, stage=REDIS_STAGE, may_be_late=True)
    return embedded.url(settings.state_dir), [child]


class _Private:
    """The embedded Redis: first started before the supervisor, so that what keeps it from starting is told at once."""

    def __init__(self, state_dir: Path, program: str) -> None:
        self._state_dir = state_dir
        self._program = program
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
        process = embedded.start(self._state_dir, self._program)
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
                client.time()  # not PING: refused like writes where it cannot save (MISCONF), while mail goes on
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


def warn_of_lost_promises(settings: Settings, url: str) -> None:
    """Log what keeps this Redis from keeping what it acknowledges."""
    for finding in asyncio.run(probe_redis(settings, url)):
        if not finding.ok:
            promises.tell(finding)


def register(settings: Settings, continuity: Continuity, role: Role) -> None:
    """See whether the ledger is the one that we knew, before anybody delivers, and make the backups known to it."""
    try:
        with sync_client(settings.redis, settings.redis.timeout_seconds, retries=0) as client:
            if role.delivers:
                registry.register_now(client, settings.copied)
            continuity.look(client)
    except RedisError as error:
        if settings.spool.dir is None and role.delivers:
            raise NoRedis(f"redis: {printable(str(error))}") from error
        maillog.notice("warning", "the ledger does not hear of the backups", reason=printable(str(error)))
