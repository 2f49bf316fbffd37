"""The backups that need processes of their own, where the quiet ones share one: who is busy, hangs or is in trouble.

All three show alike: there is work at each of several looks. The supervisor asks every few seconds, in one round trip.
Meanwhile, and if the process of its own dies, the shared one serves it; so who serves may change, but never whether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redis.exceptions import RedisError
from rq.registry import StartedJobRegistry

from relay import maillog
from relay.config.loader import Settings
from relay.daemon.slots import Child
from relay.ledger import rq_jobs
from relay.mail.destination import Destination
from relay.redisio.clients import sync_client

_BUSY = 2  # looks in a row with work, until it gets processes of its own
_QUIET = 10  # looks in a row without, until these end
_SECONDS = 1.0  # for Redis to answer: meanwhile the supervisor does nothing else


class BusyDestinations:
    """Call it for the workers that there should be now, None when that cannot be found out."""

    def __init__(self, settings: Settings, workers_for: Callable[[Destination], Sequence[Child]]) -> None:
        self._settings = settings
        self._workers_for = workers_for
        self._looks: dict[str, int] = {}  # in a row that spoke for a change
        self._serving: dict[str, Sequence[Child]] = {}

    def __call__(self) -> Sequence[Child] | None:
        backups = self._settings.copied
        try:
            with (
                sync_client(self._settings.redis, _SECONDS, retries=0) as client,
                client.pipeline(transaction=False) as pipe,
            ):
                for backup in backups:
                    pipe.exists(rq_jobs.queue(client, backup.name).key)
                    pipe.exists(StartedJobRegistry.key_template.format(backup.queue_name))
                found = pipe.execute(raise_on_error=False)
        except (RedisError, OSError):
            return None
        for backup, waiting, started in zip(backups, found[::2], found[1::2], strict=True):
            self._judge(backup, has_work=1 in {waiting, started})
        return [child for children in self._serving.values() for child in children]

    def _judge(self, backup: Destination, *, has_work: bool) -> None:
        name = backup.name
        if has_work == (name in self._serving):
            self._looks.pop(name, None)
            return
        self._looks[name] = self._looks.get(name, 0) + 1
        if self._looks[name] < (_BUSY if has_work else _QUIET):
            return
        del self._looks[name]
        if has_work:
            maillog.notice("info", "a backup is busy: it gets workers of its own", destination=name)
            self._serving[name] = self._workers_for(backup)
        else:
            maillog.notice("info", "a backup is quiet again: it shares a worker", destination=name)
            del self._serving[name]
