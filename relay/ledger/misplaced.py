"""Keys of another type than the ledger and RQ have there: they are renamed, out of the way.

Every command and script on such a key fails, so one of them would stop the scheduler, the sweep or the release of a
copy for good, whoever put it there. What it held is kept, under ``smtpdup:aside:`` and its name; what the key should
hold is made again by the sweep, as after a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rq.registry import DeferredJobRegistry, FinishedJobRegistry
from rq.worker_registration import REDIS_WORKER_KEYS, WORKERS_BY_QUEUE_KEY

from relay import maillog
from relay.ledger import keys, rq_jobs
from relay.ledger.scripts import script
from relay.mail import ids

_FIXED = {
    keys.STAGED: "zset",
    keys.UNCERTAIN: "zset",
    keys.TWINS: "hash",
    keys.COVERED: "hash",
    keys.DESTINATIONS: "hash",
    keys.COUNTERS: "hash",
    keys.OWNERS: "hash",
    keys.RECONCILER: "string",
    keys.LISTS: "set",
    keys.KEPT: "set",
    keys.LEDGER: "hash",
    keys.AUDIT: "stream",
    keys.TOPOLOGY: "string",
    keys.INTENT: "string",
    keys.MOVES: "hash",
    keys.MOVES_STATE: "string",
    keys.MOVES_LOG: "list",
    keys.RELAYS: "hash",
    keys.HOSTS: "hash",
    keys.REACH: "hash",
    keys.EVENTS: "list",
    "rq:queues": "set",
    REDIS_WORKER_KEYS: "set",
}
_OF_DESTINATION = {
    keys.PENDING: "zset",
    keys.OWN: "hash",
    keys.BUSY: "zset",
    keys.HOLDERS: "hash",
    keys.FAILED: "zset",
    keys.FAILURE: "hash",
    keys.HEALTH: "hash",
    keys.THROTTLE: "hash",
    keys.THROTTLED: "hash",
    keys.DIVERGENCE: "zset",
    keys.DOMAINS: "hash",
    keys.OUTAGES: "list",
    keys.EHLO: "string",
    keys.PROBED: "hash",
}


def set_aside(connection: Any, configured: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Rename what is of another type, also of these destinations and of all registered; returns (key, type found).

    Raises RedisError.
    """
    moved = _set_aside(connection, _FIXED)
    names = {*configured, *ids.names(connection.hkeys(keys.DESTINATIONS))}
    wanted: dict[str, str] = {}
    for name in sorted(names):
        wanted |= {prefix + name: kind for prefix, kind in _OF_DESTINATION.items()} | _of_queue(connection, name)
    return moved + (_set_aside(connection, wanted) if wanted else [])


def _set_aside(connection: Any, wanted: Mapping[str, str]) -> list[tuple[str, str]]:
    found = [ids.text(word) for word in connection.eval(script("set_aside"), len(wanted), *wanted, *wanted.values())]
    moved = list(zip(found[::2], found[1::2], strict=True))
    for key, kind in moved:
        maillog.notice("error", "key of another type set aside", key=key, type=kind, now=f"{keys.ASIDE}{key}")
    return moved


def _of_queue(connection: Any, name: str) -> dict[str, str]:
    queue = rq_jobs.queue(connection, name)
    registries = (
        queue.scheduled_job_registry,
        queue.started_job_registry,
        queue.failed_job_registry,
        FinishedJobRegistry(queue=queue),
        DeferredJobRegistry(queue=queue),
    )
    return {
        queue.key: "list",
        queue.intermediate_queue_key: "list",
        WORKERS_BY_QUEUE_KEY % queue.name: "set",
        **{registry.key: "zset" for registry in registries},
    }
