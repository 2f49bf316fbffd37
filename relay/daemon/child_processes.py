"""The children of given settings: relay processes, workers, housekeeping, on what outlives them.

Sockets, shared memory and the address of Redis exist before the first fork and stay; ChildProcesses makes the children
that use them, for the settings of the start and for those of every reload.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from relay import log_lines
from relay.child import ChildContext, keep_living
from relay.cockpit.host_report import HostReport
from relay.cockpit.reachability import Looks, keep_looking
from relay.cockpit.sampler import EventTeller, Sampler, keep_sampling
from relay.config.loader import Settings
from relay.daemon.child_status import ChildStatus
from relay.daemon.slots import AROUND_STAGE, RELAY_STAGE, Child
from relay.daemon.start import Role
from relay.daemon.worker_children import are_shared, own_workers, shared_worker
from relay.ledger import hosts, registry
from relay.mail.destination import Destination
from relay.monitoring import answers, promises
from relay.redisio.clients import sync_client
from relay.routing import loading
from relay.server import relay_process
from relay.server.listening import Place
from relay.stopping import StopEvent
from relay.trace import emitter, files
from relay.trace.collector import Collector
from relay.trace.remote_lookup import keep_answering

if TYPE_CHECKING:
    from relay import metric_store

_LOOK_EVERY = 0.1
_PATIENCE = 5.0  # seconds for Redis, which holds back an answer while there is none


@dataclass(frozen=True, slots=True)
class ChildProcesses:
    """Makes children for settings; ``listener`` is the status server's, ``places`` are the relay processes'."""

    role: Role
    url: str
    places: Sequence[Place]
    listener: socket.socket | None
    arena: metric_store.Arena | None
    child_status: ChildStatus
    trace: tuple[socket.socket, socket.socket] | None  # the ends of the trace's channel: to read, to write

    def of(self, settings: Settings, generation: int = 1) -> list[Child]:
        """Return all children that these settings ask for."""
        children = self._delivering(settings) if self.role.delivers else []
        duties = _sweeping(settings, self.url) if self.role.delivers else {}
        duties |= self._watching(settings)
        duties = {name: _after_the_former(duty) for name, duty in duties.items()}
        duties["signs of life"] = keep_living
        if self.listener:
            duties["status"] = self._status(settings, self.listener)
        own = [self.listener] if self.listener else []
        children.append(self.fitted(_housekeeping(settings, duties), settings, own))
        children += [
            self.fitted(self._relay(n, settings, place), settings, place.sockets) for n, place in enumerate(self.places)
        ]
        return [replace(child, generation=generation) for child in children]

    def workers(self, settings: Settings, destinations: Sequence[Destination]) -> list[Child]:
        """Return the workers of these destinations."""
        return [self.fitted(child, settings) for child in own_workers(settings, destinations, self.url)]

    def _delivering(self, settings: Settings) -> list[Child]:
        """Return the workers of all backups: each has its own, or the quiet ones share one."""
        if are_shared(settings):
            return [self.fitted(shared_worker(settings, self.url), settings)]
        return self.workers(settings, settings.copied)

    def fitted(self, child: Child, settings: Settings | None = None, own: Sequence[socket.socket] = ()) -> Child:
        """Have a child close all listening sockets but its own, and count where its predecessor has.

        Kept open they would take connections that nobody accepts, once their process has ended, and a child that drains
        while its supervisor is dead would keep the port from the next start. With ``settings`` it sends what becomes of
        messages to whoever keeps that, where somebody does.
        """
        run, arena = child.run, self.arena
        if run is None:  # a program: sockets are not inherited
            return child
        listening = [sock for place in self.places for sock in place.sockets]
        listening += [self.listener] if self.listener else []

        def run_fitted(context: ChildContext) -> int:
            if arena:
                arena.take(context.name, context.seat)
            for sock in listening:
                if sock not in own:
                    sock.close()
            if settings:
                emitter.take(self.trace[1] if self.trace and settings.trace.max_bytes else None)
            return run(context)

        prepare = (lambda seat: arena.reserve(child.name, seat)) if arena else child.prepare
        return replace(child, run=run_fitted, prepare=prepare)

    def _relay(self, number: int, settings: Settings, place: Place) -> Child:
        return Child(
            f"relay-{number + 1}",
            run=lambda context: relay_process.serve(context, settings, place, self.url),
            stage=RELAY_STAGE,
            bury=lambda seat: place.counters.at_seat(seat).clear(),
            leave=relay_process.LEAVE,
        )

    def _watching(self, settings: Settings) -> dict[str, Duty]:
        """Return what tells the ledger of this host: its mail, its spool, whether it reaches the servers."""
        place = hosts.place_of(settings.state_dir, self.url)
        workers = 1 if are_shared(settings) else settings.workers.processes * len(settings.copied)
        processes = len(self.places) + workers * self.role.delivers

        def sample(context: ChildContext, stop: StopEvent) -> None:
            news = HostReport(place, self.role.name, processes, settings.spool.dir, self.child_status.still)
            steps = {"news of this host": news.tell}
            if self.arena:
                is_fresh = context.predecessor is None and context.generation == 1
                steps["flow"] = Sampler(self.arena, is_fresh=is_fresh).sample
                steps["events"] = EventTeller(self.arena).tell
            with sync_client(settings.redis, settings.redis.timeout_seconds, retries=0) as client:
                keep_sampling(client, steps, stop, {"end of this host": news.leave})

        def look(_: ChildContext, stop: StopEvent) -> None:
            looks = Looks(settings, place, delivers=self.role.delivers)
            with sync_client(settings.redis, settings.redis.timeout_seconds, retries=0) as client:
                keep_looking(client, looks, settings.ready.check_every, stop)

        duties: dict[str, Duty] = {"flow": sample, **self._tracing(settings, place)}
        duties["promises of Redis"] = lambda _, stop: promises.keep_looking(settings, self.url, stop)
        if settings.ready.check_every:
            duties["looks at the servers"] = look
        if self.role.relays and loading.sources(settings):
            duties["tables"] = lambda _, stop: loading.keep_updating(settings, stop)
        return duties

    def _tracing(self, settings: Settings, place: str) -> dict[str, Duty]:
        """Return what keeps the trace of this host, and what tells other hosts of it."""
        if self.trace is None or not settings.trace.max_bytes:
            return {}
        reading, _ = self.trace

        def collect(_: ChildContext, stop: StopEvent) -> None:
            Collector(
                settings.trace, settings.state_dir, self.role.name, reading, min_free=settings.spool.min_free
            ).run(stop)

        def answer(_: ChildContext, stop: StopEvent) -> None:
            seconds = max(settings.redis.timeout_seconds, _PATIENCE)
            folder = files.folder_of(settings.state_dir)
            keep_answering(partial(sync_client, settings.redis, seconds, retries=0), folder, place, stop)

        return {"trace": collect, "trace for other hosts": answer}

    def _status(self, settings: Settings, listener: socket.socket) -> Duty:
        seat = self.places[0].counters if self.places else None
        prefix = "relay-" if self.role.relays else "worker-"

        def be_status(_: ChildContext, stop: StopEvent) -> None:
            from relay.page import server  # noqa: PLC0415  (20 MB, that only the housekeeping process needs)

            status = self.child_status
            failing, hanging = partial(status.failing, prefix), partial(status.still, prefix)
            found = answers.of(
                settings, self.url, self.arena, seat=seat, failing=failing, hanging=hanging, still=status.still
            )
            server.serve(replace(settings, redis=settings.redis.at(self.url)), listener, found, stop)

        return be_status


Duty = Callable[[ChildContext, StopEvent], None]  # a task of the housekeeping, until the event is set


def _housekeeping(settings: Settings, duties: Mapping[str, Duty]) -> Child:
    from workers.upkeep.housekeeping import housekeep  # noqa: PLC0415  (only where something is to be run)

    def be_housekeeping(context: ChildContext) -> int:
        log_lines.configure(settings.log.level, settings.log.format, context.name, threads=True)
        context.ready()
        return housekeep({name: partial(duty, context) for name, duty in duties.items()})

    return Child("housekeeping", run=be_housekeeping, stage=AROUND_STAGE)


def _after_the_former(duty: Duty) -> Duty:
    """Have a duty begin when no housekeeping of an earlier generation does it any more, which drains beside us."""

    def begin(context: ChildContext, stop: StopEvent) -> None:
        while (living := context.living()) is None or living - {context.instance}:
            if stop.wait(_LOOK_EVERY):
                return
        duty(context, stop)

    return begin


def _sweeping(settings: Settings, url: str) -> dict[str, Duty]:
    from workers.delivery.retry import longest_delay  # noqa: PLC0415  (of the workers, that a relay alone does not need)
    from workers.rqworker.scheduler import keep_scheduling  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)
    from workers.rqworker.worker_process import connector  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)
    from workers.upkeep.reconciler import keep_reconciling  # noqa: PLC0415  (RQ: 20 MB that a relay alone does not need)

    # Stable, so that the next start goes on with the locks instead of waiting for their end.
    name = hosts.place_of(settings.state_dir, url)

    def schedule(_: ChildContext, stop: StopEvent) -> None:
        connect = connector(settings.redis)
        with connect() as client:

            def queues() -> list[str]:
                """Return those of a destination that another host's relay has made known, too."""
                known = registry.destinations(client).values()
                return sorted({d.queue_name for d in (*settings.copied, *known)})

            keep_scheduling(connect, queues, name, stop, longest=longest_delay(settings.retry))

    def reconcile(_: ChildContext, stop: StopEvent) -> None:
        keep_reconciling(connector(settings.redis), settings, name, stop, every=settings.workers.sweep)

    return {"scheduler": schedule, "reconciler": reconcile}
