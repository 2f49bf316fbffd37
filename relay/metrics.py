"""Every metric of smtp-dup, declared once with its help.

Processes share them in memory (metric_store.py). Numbers that are in the ledger (pending, oldest age, failed) are not
counted here but read at scrape time, in monitoring/collectors.py. Updating a metric never raises.
"""

import functools
import time
from bisect import bisect_left
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram, values

from relay import log_output, metric_store

values.ValueClass = metric_store.Value  # must be set before the first metric is made

connections = Counter("smtpdup_connections_total", "Client connections accepted")
connections_refused = Counter("smtpdup_connections_refused_total", "Client connections refused at once")
session_errors = Counter("smtpdup_session_errors_total", "Unexpected errors in a session, answered 451")
logins = Counter("smtpdup_logins_total", "Passwords checked: accepted, refused", ["result"])
primary_trouble = Counter(
    "smtpdup_primary_trouble_total",
    "Failures at the primary, answered 451, by stage: connect, EHLO, MAIL, RCPT, DATA, body, dot...",
    ["stage"],
)
messages = Counter(
    "smtpdup_messages_total",
    "Messages by the reply to the dot: accepted, refused_4xx, refused_5xx, uncertain (none), own (a rule of the relay)",
    ["result"],
)
recipients = Counter(
    "smtpdup_recipients_total", "RCPT commands by reply: accepted, refused_4xx, refused_5xx", ["result"]
)
bytes_accepted = Counter("smtpdup_accepted_bytes_total", "Octets of the messages that the primary accepted")
_DOT_TO_REPLY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
primary_seconds = Histogram(
    "smtpdup_primary_seconds", "Time from the held dot to the primary's reply", buckets=_DOT_TO_REPLY
)
server_seconds = Histogram(
    "smtpdup_server_seconds",
    "Time from the held dot to the reply of the server that answers, with routes",
    ["server"],
    buckets=_DOT_TO_REPLY,
)
backup_seconds = Histogram(
    "smtpdup_backup_seconds",
    "Time from the dot of a copy to the backup's reply",
    ["destination"],
    buckets=_DOT_TO_REPLY,  # the same as for the primary, to compare the two
)
MAIL_FEATURES = ("SMTPUTF8", "8BITMIME", "DSN")
features = Counter(
    "smtpdup_mail_features_total",
    "Accepted messages that need this extension of a server: SMTPUTF8, 8BITMIME, DSN",
    ["extension"],
)
stage_seconds = Histogram(
    "smtpdup_stage_seconds",
    "Time to make a copy durable before the dot",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
failovers = Counter(
    "smtpdup_failovers_total",
    "Turns of a relay process from a server that cannot be used to the next one of its route",
    ["server", "to"],
)
split = Counter(
    "smtpdup_split_total",
    "Recipients that need another primary than the others of their message, by what is done",
    ["how"],
)
split_refused = Counter(
    "smtpdup_split_refused_total",
    "Parts of accepted messages that a primary refused for good at the end, while another took its own",
    ["server"],
)
route_messages = Counter(
    "smtpdup_route_messages_total",
    "Messages accepted by a route, and by the server that took them",
    ["route", "server"],
)
route_refused = Counter(
    "smtpdup_route_refused_total",
    "Messages of a route that the server who was to take them refused at their end",
    ["route", "server"],
)
copies = Counter("smtpdup_copies_total", "Copies of accepted messages, by the backup that gets them", ["destination"])
spooled = Counter("smtpdup_spooled_total", "Copies that went to the spool instead of Redis")
unspooled = Counter("smtpdup_unspooled_total", "Messages moved from the spool into Redis")
damaged_records = Counter(
    "smtpdup_damaged_records_total",
    "Damaged stored messages, kept and never sent, by place: redis, spool",
    ["where"],
)
for _where in ("redis", "spool"):
    damaged_records.labels(_where)  # so that it is exported as zero from the start
copies_lost = Counter("smtpdup_copies_lost_total", "Accepted messages whose copies could not be stored")
log_lines_dropped = Counter("smtpdup_log_lines_dropped_total", "Log lines that could not be written to standard error")
log_output.on_drop = log_lines_dropped.inc
trace_dropped = Counter(
    "smtpdup_trace_dropped_total",
    "Events that are not in the trace: nobody took them in time, or they cannot be written",
)
deliveries = Counter(
    "smtpdup_deliveries_total",
    "Attempts to deliver a copy by result: delivered, deferred, failed, trouble (the server, not the message)",
    ["destination", "result"],
)
first_tries = Counter(
    "smtpdup_first_tries_total",
    "Copies whose first try began at once, handed over by a relay process of the same host",
    ["destination"],
)
delivery_age_seconds = Histogram(
    "smtpdup_delivery_age_seconds",
    "Time from acceptance to delivery at a backup",
    ["destination"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400, 432000),
)


@functools.cache
def increment(counter: Counter, *labels: str) -> Callable[[float], None]:
    """Return what adds to a counter; kept, since to find it and to check its labels takes longer than to count."""
    child = counter.labels(*labels) if labels else counter
    adding: Callable[[float], None] = child._value.inc  # noqa: SLF001 - our own class (metric_store.Value)
    return adding


@functools.cache
def observer(histogram: Histogram, *labels: str) -> Callable[[float], None]:
    """Return what observes a value in a histogram; kept, as with ``increment``."""
    child = histogram.labels(*labels) if labels else histogram
    bounds, buckets, add = child._upper_bounds, child._buckets, child._sum.inc  # noqa: SLF001 - as above

    def observe(value: float) -> None:
        add(value)
        buckets[bisect_left(bounds, value)].inc(1)

    return observe


def reply_class(code: int) -> str:
    """Return the label value for a reply code."""
    return "accepted" if 200 <= code < 300 else "refused_5xx" if 500 <= code < 600 else "refused_4xx"


class HourlyMaximum:
    """A gauge with the largest value in the latest hour (by the clock) in which this process noted one."""

    def __init__(self, name: str, text: str) -> None:
        self._gauge = Gauge(name, text, multiprocess_mode="max")
        self._hour = 0
        self._most = 0

    def note(self, value: int) -> None:
        hour = int(time.time()) // 3600
        if value > self._most or hour != self._hour:
            self._hour, self._most = hour, value
            self._gauge.set(value)


largest_message = HourlyMaximum(
    "smtpdup_largest_message_bytes", "The largest message that the primary accepted in the latest hour with mail"
)
most_recipients = HourlyMaximum(
    "smtpdup_most_recipients", "The most recipients of a message that the primary accepted in the latest hour with mail"
)
