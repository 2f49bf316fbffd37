"""The divergence of every destination as metrics, from what the ledger says at scrape time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from relay.ledger.divergence import DEFERRED, GIVEN_UP, REFUSED
from relay.ledger.divergence_groups import Numbers


def families(found: Mapping[str, Numbers]) -> Iterator[Metric]:
    """Yield the metrics of all destinations."""
    text = "Recipients that the primary took and a backup did not, by kind, without those of acknowledged reasons"
    opened = GaugeMetricFamily("smtpdup_divergence_open", text, labels=["destination", "kind"])
    text = "Reasons for refusals and deferrals that are listed"
    reasons = GaugeMetricFamily("smtpdup_divergence_reasons", text, labels=["destination"])
    text = "Of these, reasons that an operator has acknowledged and that have open recipients"
    acknowledged = GaugeMetricFamily("smtpdup_divergence_acknowledged", text, labels=["destination"])
    text = "Recipients that a backup put off at first and took soon after, of the reasons that are listed"
    noise = GaugeMetricFamily("smtpdup_divergence_noise", text, labels=["destination"])
    for name, numbers in found.items():
        for kind in (REFUSED, GIVEN_UP, DEFERRED):  # each from the start, as zero
            opened.add_metric([name, kind], numbers.open.get(kind, 0))
        reasons.add_metric([name], numbers.groups)
        acknowledged.add_metric([name], numbers.acknowledged)
        noise.add_metric([name], numbers.noise)
    yield from (opened, reasons, acknowledged, noise)
