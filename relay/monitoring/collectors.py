"""What ledger, spool and relay processes hold at scrape time, for /metrics.

A Redis that is away takes only the ledger's numbers from the answer, and a spool that cannot be read only its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from loguru import logger
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from relay.config.model import RedisSettings
from relay.ledger import divergence_groups, overview
from relay.ledger.divergence_groups import Numbers
from relay.monitoring import divergence_metrics, topology
from relay.redisio.clients import sync_client
from relay.smtpd.shared_counters import ProcessCounters
from relay.spool import writer
from relay.topology import decisions
from relay.topology.decisions import View


class SeatCollector(Collector):
    """What all relay processes hold now."""

    def __init__(self, seat: ProcessCounters) -> None:
        self._seat = seat

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("smtpdup_clients", "Clients connected now", value=self._seat.clients)
        text = "Octets of messages in memory now"
        yield GaugeMetricFamily("smtpdup_in_flight_bytes", text, value=self._seat.octets)


class SpoolCollector(Collector):
    """What waits in this host's spool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        try:
            found = writer.summary(self._folder)
        except OSError as error:
            logger.warning("the spool cannot be read: {}", error)
            return
        yield GaugeMetricFamily("smtpdup_spool_messages", "Messages in the spool", value=found.messages)
        yield GaugeMetricFamily("smtpdup_spool_bytes", "Octets in the spool", value=found.bytes)
        text = "Age of the message that is in the spool for longest"
        yield GaugeMetricFamily("smtpdup_spool_oldest_seconds", text, value=found.oldest_age_s)
        text = "Files that were set aside because they cannot be read"
        yield GaugeMetricFamily("smtpdup_spool_corrupt", text, value=found.corrupt)
        text = "Files that a crash left half written: nobody was promised anything"
        yield GaugeMetricFamily("smtpdup_spool_unfinished", text, value=found.unfinished)
        text = "Copies in the spool that wait for this backup alone"
        backlogs = GaugeMetricFamily("smtpdup_spool_backlog", text, labels=["destination"])
        for name, count in found.backlogs.items():
            backlogs.add_metric([name], count)
        yield backlogs


class LedgerCollector(Collector):
    """What the ledger says at scrape time, so that no process has to keep count of it."""

    def __init__(self, server: RedisSettings) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        rows, changed_at, seen, divergences = self._read()
        yield GaugeMetricFamily("smtpdup_redis_up", "Whether Redis answered this scrape", value=float(rows is not None))
        if rows is None:
            return  # no sample at all: zero would say that nothing waits
        if seen is not None:
            yield from topology.families(seen)
        gauges: tuple[tuple[str, str, Callable[[overview.Summary], float]], ...] = (
            ("smtpdup_pending", "Copies that wait", lambda r: r.pending),
            ("smtpdup_oldest_pending_seconds", "Age of the copy that waits longest", lambda r: r.oldest_age_s),
            ("smtpdup_retrying", "Copies that wait for another try", lambda r: r.retrying),
            ("smtpdup_failed", "Copies in the failed list", lambda r: r.failed),
            ("smtpdup_paused", "Whether only probes go to this destination", lambda r: r.paused),
            ("smtpdup_held", "Whether an operator holds this destination", lambda r: r.held),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["destination"])
            for row in rows:
                gauge.add_metric([row.destination], float(value(row)))
            yield gauge
        text = "When the ledger last turned out to be empty, older or another one, seconds since the epoch; 0: never"
        yield GaugeMetricFamily("smtpdup_ledger_changed_timestamp_seconds", text, value=changed_at)
        text = "Copies delivered since the ledger began"
        counter = CounterMetricFamily("smtpdup_delivered", text, labels=["destination"])
        for row in rows:
            counter.add_metric([row.destination], row.delivered)
        yield counter
        yield from divergence_metrics.families(divergences)

    def _read(self) -> tuple[list[overview.Summary] | None, float, View | None, dict[str, Numbers]]:
        try:
            with sync_client(self._server, self._server.timeout_seconds, retries=0) as client:
                rows = overview.summary(client)
                found = {row.destination: divergence_groups.numbers(client, row.destination) for row in rows}
                return rows, overview.change(client).at, decisions.view(client), found
        except (RedisError, OSError) as error:
            logger.debug("no numbers from the ledger: {}", error)
            return None, 0.0, None, {}
