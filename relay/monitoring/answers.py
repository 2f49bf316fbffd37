"""What /healthz, /readyz and /metrics answer.

/healthz says that this process lives and no relay dies in a loop, /readyz whether mail can be taken and kept (200, or
503 with the reasons), /metrics what the processes counted and what ledger and spool hold at that moment. A Redis that
is away is a warning in /readyz where a spool keeps the copies, else a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from relay.config.model import Settings
from relay.json_text import json_text
from relay.metric_store import Arena
from relay.monitoring import findings, routes, topology
from relay.monitoring.collectors import LedgerCollector, SeatCollector, SpoolCollector
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.readiness_metrics import ReadinessCollector
from relay.smtpd.shared_counters import ProcessCounters

_REDIS_SECONDS = 2.0  # a Redis that hangs is waited for twice in an answer, and who asks gives it ten seconds at most
_SPOOLED = {"redis", "redis replicas", findings.MEMORY}  # trouble with these sends copies to the spool
_MAIL_GOES_ON = {
    *(findings.PROCESSES, findings.LEDGER, routes.MOVED),
    *(topology.SUBJECT, topology.MOVED, topology.HOSTS),
}
_ABOUT_FAILOVER = ("sentinel ", "replica ")  # mail goes on as long as the master does


class HttpAnswer(NamedTuple):
    """What one path answers."""

    status: HTTPStatus
    content_type: str
    body: bytes


def of(
    settings: Settings,
    redis_url: str,
    arena: Arena | None,
    *,
    seat: ProcessCounters | None = None,
    failing: Callable[[], list[str]] = list,
    hanging: Callable[[], list[str]] = list,
    still: Callable[[], list[str]] = list,
) -> Mapping[str, Callable[[], HttpAnswer]]:
    """Return what finds the answer of each path.

    With a relay's ``seat`` its port is watched too; ``failing`` names who dies in a loop, ``hanging`` who of the same
    lives and does nothing, ``still`` all who do so.
    """
    server = settings.redis.at(redis_url)
    server = replace(server, timeout_seconds=min(server.timeout_seconds, _REDIS_SECONDS))
    settings = replace(settings, redis=server)
    verdicts = ReadinessCollector(settings)
    collectors = [LedgerCollector(server), verdicts, *_relay_collectors(settings, seat)]
    return {
        "/healthz": lambda: healthy(failing(), hanging()),
        "/readyz": lambda: ready(findings.of(settings, relaying=seat is not None) + findings.of_processes(still())),
        "/metrics": lambda: metrics(arena, *collectors),
    }


def healthy(failing: Sequence[str], hanging: Sequence[str] = ()) -> HttpAnswer:
    """Return the answer of /healthz: 503 while processes die again and again, or live and do nothing."""
    if not failing and not hanging:
        return HttpAnswer(HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n")
    lines = [f"{', '.join(failing)}: ended again and again, soon after the start; the log says how\n"] * bool(failing)
    lines += [f"{', '.join(hanging)}: no sign of life\n"] * bool(hanging)
    return HttpAnswer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", "".join(lines).encode())


def ready(found: list[ProbeResult]) -> HttpAnswer:
    """Return the answer of /readyz: 503 with the reasons as soon as mail cannot be taken and kept.

    A Redis that cannot be used is only a warning beside a spool that can. One that acknowledges what it may lose is
    a reason: nothing goes to the spool then. Who answers for whom, and who does not follow, is a warning: mail goes on.
    """
    can_spool = any(f.subject == findings.SPOOL and f.ok for f in found)
    warnings = [
        f
        for f in found
        if not f.ok
        and (
            (f.subject in _SPOOLED and can_spool)
            or f.subject in _MAIL_GOES_ON
            or f.subject.startswith((findings.HELD, routes.SUBJECT, topology.FAILOVER))
            or f.subject.startswith(_ABOUT_FAILOVER)
        )
    ]
    reasons = [f for f in found if not f.ok and f not in warnings]
    content = {
        "ready": not reasons,
        "reasons": [f"{f.subject}: {f.text}" for f in reasons],
        "warnings": [f"{f.subject}: {f.text}" for f in warnings],
        "checks": [{"subject": f.subject, "ok": f.ok, "text": f.text} for f in found],
    }
    body = json_text(content, indent=2) + "\n"
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return HttpAnswer(status, "application/json", body.encode())


def metrics(arena: Arena | None, *others: Collector) -> HttpAnswer:
    """Return the answer of /metrics: the sum over all processes, ended ones too, and what is so at this moment."""
    registry = CollectorRegistry()
    for collector in (arena, *others):
        if collector is not None:
            registry.register(collector)
    return HttpAnswer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


def _relay_collectors(settings: Settings, seat: ProcessCounters | None) -> list[Collector]:
    if seat is None:
        return []
    return [SeatCollector(seat), *([SpoolCollector(settings.spool.dir)] if settings.spool.dir else [])]
