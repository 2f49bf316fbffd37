"""The verdict on each backup as metrics: whether it is ready, and how many criteria came to what.

A verdict reads the flow of five weeks, so it is asked for once a minute, however often it is scraped.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from loguru import logger
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from relay.cockpit.evidence_from_redis import UnknownBackup
from relay.cockpit.finding import Result
from relay.cockpit.readiness import Verdict, verdicts
from relay.config.model import Settings
from relay.redisio.clients import sync_client

_KEPT_SECONDS = 60.0


class ReadinessCollector(Collector):
    """What `smtp-dup ready` would say; no sample where Redis does not answer."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._found: Sequence[Verdict] = ()
        self._at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            if time.monotonic() - self._at >= _KEPT_SECONDS:
                self._found, self._at = self._ask(), time.monotonic()
            found = self._found
        text = "Whether a backup is ready to be the primary: no criterion fails, none is unknown"
        ready = GaugeMetricFamily("smtpdup_ready", text, labels=["destination"])
        text = "Criteria of a backup's readiness by result: pass, warn, fail, unknown"
        counts = GaugeMetricFamily("smtpdup_ready_criteria", text, labels=["destination", "result"])
        for verdict in found:
            ready.add_metric([verdict.name], float(verdict.is_ready))
            for result in Result:
                counts.add_metric([verdict.name, result.value], len(verdict.having(result)))
        yield ready
        yield counts

    def _ask(self) -> Sequence[Verdict]:
        server = self._settings.redis
        try:
            with sync_client(server, server.timeout_seconds, retries=0) as client:
                return verdicts(client, self._settings)
        except (RedisError, OSError, UnknownBackup) as error:
            logger.debug("no verdict: {}", error)
            return ()
