"""Revival: puts the jobs of a killed worker back to the front of its queue at once.

RQ would find an abandoned job after minutes and mark it as failed. Here the replacement, which knows its predecessor's
name, puts the job back unchanged: because of the ledger's claims, a job that runs twice repeats nothing. One script
does it, so that a crash leaves nothing half done; repeating it is harmless. Only workers known to be dead are touched,
never those of another host, whose processes cannot be seen from here.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from redis import Redis
from rq import Queue
from rq.intermediate_queue import IntermediateQueue
from rq.registry import StartedJobRegistry
from rq.worker import BaseWorker
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from relay import limits
from relay.ledger.redis_clock import shorten
from relay.mail.ids import text

PLACE = "place"  # field of the worker's hash: the space in which its pid is unique
BORN = "born"  # field of the worker's hash: the start time of the process, to distinguish reused pids
LIFE = 120  # seconds from a worker's last heartbeat to the end of its key
_GRACE = 0.05  # seconds; a live worker leaves a job in the intermediate list for a few milliseconds

# KEYS: started registry, intermediate list, queue. ARGV: worker name, ids found in the intermediate list.
# A started entry is "<job>:<execution>". The job's own fields are RQ's; "queued" is what RQ sets on a requeue.
_REVIVE = """
local again, seen = {}, {}
local function worker(key)
    local name = redis.pcall('HGET', key, 'worker_name')
    return type(name) == 'string' and name
end
local function requeue(job)
    local key = 'rq:job:' .. job
    redis.call('LREM', KEYS[2], 0, job)
    if seen[job] or redis.call('TYPE', key).ok ~= 'hash' then return end
    seen[job] = true
    redis.call('LPUSH', KEYS[3], job)
    redis.call('HSET', key, 'status', 'queued', 'worker_name', '', 'started_at', '')
    again[#again + 1] = job
end
for _, entry in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local job, execution = string.match(entry, '^([^:]*):(.*)$')
    local owner = job and (worker('rq:execution:' .. entry) or worker('rq:job:' .. job))
    if owner == ARGV[1] then
        redis.call('ZREM', KEYS[1], entry)
        redis.call('DEL', 'rq:execution:' .. entry)
        redis.call('ZREM', 'rq:executions:' .. job, execution)
        requeue(job)
    end
end
redis.call('DEL', 'rq:worker:' .. ARGV[1] .. ':executions')
for i = 2, #ARGV do
    if redis.call('LREM', KEYS[2], 1, ARGV[i]) > 0 then requeue(ARGV[i]) end
end
return again
"""


def worker_name(destination: str, instance: str, host: str = "") -> str:
    """Name a worker: ``<host>.<destination>.<pid>.<start>``; ``instance`` is the last two."""
    safe = re.sub(r"[^\w.:\[\]-]", "_", destination)  # the name is also the connection's (CLIENT SETNAME)
    return f"{host or socket.gethostname()}.{safe}.{instance}"


def revive(connection: Redis, queue: Queue, name: str) -> list[str]:
    """Put the jobs of the dead worker ``name`` back to the front of ``queue``. Returns their ids.

    The intermediate list does not tell which worker popped a job. While other workers of the queue live, a job in it
    may be on its way to one of them, so only jobs that stay there for 50 ms are put back.
    """
    stranded = _intermediate(connection, queue)
    if stranded and _others(connection, queue, name):
        time.sleep(_GRACE)
        later = set(_intermediate(connection, queue))
        stranded = [job for job in stranded if job in later]
    keys = [
        StartedJobRegistry.key_template.format(queue.name),
        IntermediateQueue.get_intermediate_queue_key(queue.key),
        queue.key,
    ]
    # EVAL, not EVALSHA: a script cache is lost with a Redis restart, which is when this is needed.
    again = cast("list[Any]", connection.eval(_REVIVE, len(keys), *keys, name, *stranded))
    return [text(job) for job in again]


def place() -> str:
    """Return an id of the space in which a pid is unique: this boot of this machine and this pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no Linux: pids of one host are of one space
        return socket.gethostname()


_PID = re.compile(rb"[0-9]{1,9}")


def born(pid: int) -> str:
    """Return when a process started, in ticks since the boot, independent of clocks; "" without Linux's /proc."""
    fields = _stat(pid)
    return fields[19] if fields else ""


def dead_here(connection: Redis, queue: Queue) -> list[str]:
    """Return the names of dead workers of ``queue`` that ran in this place, such as all killed at once."""
    here, dead = place(), []
    for name in _workers(connection, queue):
        pipe = connection.pipeline(transaction=False)
        pipe.hmget(_key(name), ["pid", PLACE, BORN])
        (found,) = pipe.execute(raise_on_error=False)
        pid, where, since = found if isinstance(found, list) else (b"", b"", b"")  # no hash, no worker
        if not where or text(where) != here or not _PID.fullmatch(pid or b""):
            continue
        # A restarted container has the same small pids, and usually the same namespace number.
        is_another = bool(since) and born(int(pid)) != text(since)
        if is_another or not _is_alive(int(pid)):
            dead.append(name)
    return dead


def served_by_a_sibling(connection: Redis, queue: Queue) -> bool:
    """Return whether a living worker of ``queue`` is another child of our supervisor (Linux; elsewhere nobody is)."""
    for name in _workers(connection, queue):
        pid, where = cast("list[Any]", connection.hmget(_key(name), ["pid", PLACE]))
        if not where or text(where) != place() or not _PID.fullmatch(pid or b"") or int(pid) == os.getpid():
            continue
        fields = _stat(int(pid))
        if fields and fields[0] not in "ZX" and int(fields[1]) == os.getppid():
            return True
    return False


def shorten_lives(connection: Redis, queue: Queue) -> None:
    """Limit the life of workers' keys to ``LIFE``, in case Redis's clock was set back since the last heartbeat."""
    shorten(connection, [_key(name) for name in _workers(connection, queue)], LIFE)


def forget(connection: Redis, queue: Queue, names: Iterable[str]) -> None:
    """Remove dead workers from RQ's list, after their jobs were put back."""
    with connection.pipeline() as pipeline:
        for name in names:
            pipeline.srem(BaseWorker.redis_workers_keys, _key(name))
            pipeline.srem(WORKERS_BY_QUEUE_KEY % queue.name, _key(name))
            pipeline.delete(_key(name))
        pipeline.execute()


def _key(name: str) -> str:
    return BaseWorker.redis_worker_namespace_prefix + name


def _workers(connection: Redis, queue: Queue) -> list[str]:
    members = cast("set[Any]", connection.smembers(WORKERS_BY_QUEUE_KEY % queue.name))
    return [text(key).removeprefix(BaseWorker.redis_worker_namespace_prefix) for key in members]


def _others(connection: Redis, queue: Queue, name: str) -> bool:
    """Return whether another worker than ``name`` may be alive on ``queue``."""
    dead = {name, *dead_here(connection, queue)}
    return any(n not in dead and connection.exists(_key(n)) for n in _workers(connection, queue))


def _intermediate(connection: Redis, queue: Queue) -> list[str]:
    key = IntermediateQueue.get_intermediate_queue_key(queue.key)
    return [text(job) for job in cast("list[Any]", connection.lrange(key, 0, -1))]


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat from the state on, [] if there is no such process."""
    try:
        # The name in parentheses may hold anything; what follows it is regular.
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError as error:
        if limits.is_own(error):
            raise
        return []


def _is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not (a container's first process may never reap orphans).

    Raises OSError if that cannot be found out: without a free descriptor, no process is taken for dead.
    """
    if fields := _stat(pid):
        return fields[0] not in "ZX"
    if Path("/proc/self/stat").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
