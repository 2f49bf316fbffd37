"""The worker processes: of one backup each, or one of all quiet ones, with how many connections.

Nothing of RQ or of the workers is imported before a process needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from relay import limits, log_lines
from relay.child import ChildContext
from relay.config.loader import Settings
from relay.daemon.slots import WORKERS_STAGE, Child
from relay.mail.destination import Destination

if TYPE_CHECKING:
    from workers.rqworker.worker_process import Served

_SHARED_CONNECTIONS = 4  # to a backup that is quiet: who needs more is busy, and gets a process of its own
_FILES_OF_A_SESSION = 6  # descriptors of such a backup besides: its connections to Redis
_MOST_FILES = 1 << 20


def are_shared(settings: Settings) -> bool:
    """Whether there are so many backups that the quiet ones share a worker process."""
    return len(settings.copied) > settings.workers.shared_above


def own_workers(settings: Settings, destinations: Sequence[Destination], url: str) -> list[Child]:
    """Return the workers of these destinations, each of its own."""
    from workers.rqworker import worker_process  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    limit = limits.files()

    def child(destination: Destination, number: int) -> Child:
        most = limits.worker_connections(limit, _width(destination))

        def be_worker(context: ChildContext) -> int:
            log_lines.configure(settings.log.level, settings.log.format, context.name, threads=True)
            return worker_process.serve(
                context, _served(settings, destination, most, url), worker_process.connector(settings.redis)
            )

        return Child(f"worker-{destination.name}-{number}", run=be_worker, stage=WORKERS_STAGE)

    return [child(d, n) for d in destinations for n in range(1, settings.workers.processes + 1)]


def shared_worker(settings: Settings, url: str) -> Child:
    """Return the one worker of all quiet backups."""
    from workers.rqworker import shared_process, worker_process  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    room = limits.worker_connections(limits.files(), _MOST_FILES) // len(settings.copied)
    most = max(1, min(_SHARED_CONNECTIONS, room - _FILES_OF_A_SESSION))
    tenants = [_served(settings, backup, most, url) for backup in settings.copied]

    def be_shared(context: ChildContext) -> int:
        log_lines.configure(settings.log.level, settings.log.format, context.name, threads=True)
        return shared_process.serve(context, tenants, worker_process.connector(settings.redis))

    return Child("worker-shared", run=be_shared, stage=WORKERS_STAGE)


def _served(settings: Settings, destination: Destination, most: int, url: str) -> Served:
    """Return a destination as it is served, by a courier with at most so many connections."""
    from workers.delivery import courier  # noqa: PLC0415  (of the workers, that a relay alone does not need)
    from workers.rqworker import live_jobs, worker_process  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    fitted = replace(destination, connections=most) if _width(destination) > most else destination
    takes = settings.workers.first_try_from_memory
    return worker_process.Served(
        destination.name,
        destination.queue_name,
        lambda name: courier.Courier(settings, fitted, name, url, takes_first_tries=takes),
        lambda connection, dead: live_jobs.put_back_leased(connection, destination.name, dead),
    )


def _width(destination: Destination) -> int:
    from workers.delivery import retry  # noqa: PLC0415  (as above)

    return retry.Width(destination.connections).most
