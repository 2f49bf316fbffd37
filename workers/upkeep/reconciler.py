"""The reconciler: a sweep every minute, by one process of all hosts, and `queue verify` for the operator.

The lock is a lease under a stable name, so that a restarted reconciler continues at once; when its host is down, that
of another host takes over after some minutes. The lock only saves work: two sweeps at the same time do no harm. A Redis
that goes down ends a sweep and nothing else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.config.loader import Settings
from relay.ledger import archive, keys
from relay.ledger.redis_clock import shorten
from relay.repeated import Repeated
from workers.upkeep.report import Report
from workers.upkeep.sweep import SILENT_SECONDS, Sweeper

_EVERY = 60.0  # seconds between sweeps
_LONGEST = 120.0
_FIRST = 5.0
_LEASE = 200  # seconds of the lock, more than any pause
_RENEW = 15.0
_KEPT = 100  # findings that a regular sweep keeps for its report
_LOOK = 5.0  # seconds between two looks at the memory of Redis
_PAUSE = 5.0  # seconds between the two sweeps of a verification


class _Interrupted(Exception):
    """The process must stop, or another one has the lock."""


def keep_reconciling(
    connect: Callable[[], Redis], settings: Settings, name: str, stop: threading.Event, *, every: float = _EVERY
) -> None:
    """Sweep every ``every`` seconds until ``stop``, while no other process has the lock.

    ``name`` is that of the lock and must be the same after a restart.
    """
    connection = connect()
    lock = _Lock(connection, name, stop)
    sweeper = Sweeper(connection, settings, lock.renew)
    away = Repeated(
        "reconciler",
        lambda reason: maillog.notice("warning", "ledger trouble", what="reconciler", reason=reason),
        lambda text: maillog.notice("info", text),
    )
    pause = min(_FIRST, every)
    while not _wait(connection, sweeper, lock, stop, pause):
        pause = every
        try:
            lock.take()
            report = sweeper.sweep(kept=_KEPT)
            away.is_over()
            _tell(report)
            pause = max(every, min(_LONGEST, 4 * report.seconds))  # millions of copies: a fifth of the time at most
            if sweeper.misses_workers:
                pause = min(pause, max(SILENT_SECONDS, 4 * report.seconds))  # soon: the copies of a missing worker wait
        except _Interrupted:
            continue
        except RedisError as error:
            away.came(f"{type(error).__name__}: {error}")
            pause = min(_FIRST, every)
        except Exception:  # the border: a single bad record must not end the housekeeping
            logger.exception("a sweep of the reconciler failed")
    try:
        lock.give_back()
        connection.close()
    except RedisError as error:
        logger.warning("reconciler: its lock ends by itself: {}", error)


def _wait(connection: Redis, sweeper: Sweeper, lock: _Lock, stop: threading.Event, seconds: float) -> bool:
    """Wait until the next sweep; returns whether to stop. What cannot wait so long is done meanwhile."""
    until = time.monotonic() + seconds
    is_worth_it = lock.is_ours
    while (left := until - time.monotonic()) > 0:
        if stop.wait(min(left, _LOOK)):
            return True
        if not lock.is_ours or until - time.monotonic() <= 0:
            continue
        try:
            if taken := sweeper.take_over():
                maillog.notice("warning", "a worker renews its leases no more: its copies get a new job", count=taken)
            if is_worth_it and archive.is_pressed(connection):
                moved = sweeper.relieve()
                maillog.notice("info", "Redis is filling up: failed bodies moved to disk", count=moved)
                is_worth_it = moved > 0  # or there are none left that could
            lock.renew()
        except (_Interrupted, RedisError):
            is_worth_it = False  # the next sweep reports the trouble
    return stop.is_set()


class _Lock:
    """The lease of the sweeping process. Two may hold it briefly when it changes hands, which does no harm."""

    def __init__(self, connection: Redis, name: str, stop: threading.Event) -> None:
        self._connection = connection
        self._name = name
        self._stop = stop
        self._renewed = float("-inf")

    @property
    def is_ours(self) -> bool:
        """Whether this process held it at the last check, and that was not too long ago."""
        return time.monotonic() - self._renewed < _LEASE

    def take(self) -> None:
        """Take or renew the lock. Raises _Interrupted if another process has it."""
        if not self._connection.set(keys.RECONCILER, self._name, nx=True, ex=_LEASE):
            if self._connection.get(keys.RECONCILER) != self._name.encode():
                shorten(
                    self._connection, [keys.RECONCILER], _LEASE
                )  # otherwise it would last as long as a clock is set back
                self._renewed = float("-inf")
                raise _Interrupted
            self._connection.expire(keys.RECONCILER, _LEASE)
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Renew the lock periodically. Raises _Interrupted if it is lost or the process must stop."""
        if self._stop.is_set():
            raise _Interrupted
        if time.monotonic() - self._renewed > _RENEW:
            self.take()

    def give_back(self) -> None:
        if self._connection.get(keys.RECONCILER) == self._name.encode():
            self._connection.delete(keys.RECONCILER)


def verify(connection: Redis, settings: Settings, pause: float = _PAUSE, *, repair: bool = True) -> Report:
    """Compare ledger and RQ for `queue verify`; ``findings`` are its rows. Raises RedisError.

    It sweeps twice, ``pause`` seconds apart: a copy without a job counts only if both sweeps find it so, since one
    whose job is being made is no finding. The second repairs; without ``repair`` nothing is changed.
    """
    sweeper = Sweeper(connection, settings)
    aside = sweeper.set_aside() if repair else []
    sweeper.sweep(repair=False, thorough=False)
    time.sleep(max(pause, SILENT_SECONDS) if sweeper.misses_workers else pause)
    report = sweeper.sweep(repair=repair, thorough=True)
    report.add_aside(aside)
    return report


def _tell(report: Report) -> None:
    if report.counts:
        found = ", ".join(f"{count} {finding}" for finding, count in sorted(report.counts.items()))
        maillog.notice("info", "reconciled", found=found, seconds=round(report.seconds, 2))
