"""The functions that RQ jobs name: wire format, never renamed or moved.

A job is a hint that some copies wait for a destination; what is true of them is in the ledger. The functions
run in the thread of a DeliveryWorker and hand over to the courier of the destination in the process's event loop, which
has been bound before; the worker waits for the end. Without a courier for the destination, a job is refused.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import NamedTuple, Protocol

from rq import get_current_job

from relay.mail.ids import are_ids

ALLOWED = frozenset({"deliver"})  # all that a job may call here


_MOST = 10_000  # copies in a job: what workers.batch allows


class Refused(RuntimeError):
    """A job that this worker does not run; it fails with this text as the reason."""


class Interrupted(RuntimeError):
    """Raised by a courier that drains, or whose server is away: the job goes back to the front of the queue."""


class Deliverer(Protocol):
    """What delivers the copies of one destination, in one event loop; ``accepting`` and ``room`` are read anywhere.

    ``room`` is how many copies are worth having in hand at once; a first job may have more. ``deliver``, which may be
    called again meanwhile, returns when each copy that it could claim has an outcome in the ledger or is left to a
    straggler.
    ``drain`` is called once at the stop signal, also while a ``deliver`` runs: start no further copy, let
    ``deliver`` return or raise Interrupted, finish what is under way, return when all outcomes are written.
    """

    @property
    def accepting(self) -> bool: ...
    @property
    def room(self) -> int: ...
    async def start(self) -> None: ...
    async def deliver(self, job_id: str, ids: list[str]) -> None: ...
    async def drain(self) -> None: ...


class _Binding(NamedTuple):
    courier: Deliverer
    loop: asyncio.AbstractEventLoop


_bound: dict[str, _Binding] = {}  # destination -> who delivers to it in this process


def bind(destination: str, courier: Deliverer, loop: asyncio.AbstractEventLoop) -> None:
    """Give this process a courier for a destination, and the loop that the courier lives in."""
    _bound[destination] = _Binding(courier, loop)


def unbind(destination: str) -> None:
    """Take the courier away; the destination's jobs are refused from now on."""
    _bound.pop(destination, None)


def deliver(destination: str, ids: list[str]) -> Future[None]:
    """Hand the waiting copies of these messages to the courier; the future ends as its ``deliver`` does."""
    bound = _bound.get(destination) if isinstance(destination, str) else None
    if bound is None:
        raise Refused(f"this worker serves {', '.join(_bound) or 'nobody'}, not {destination!r}")
    if not are_ids(ids) or not 0 < len(ids) <= _MOST:
        raise Refused(f"ids must be a list of message ids, at most {_MOST}")
    job = get_current_job()
    return asyncio.run_coroutine_threadsafe(bound.courier.deliver(job.id if job else "", ids), bound.loop)
