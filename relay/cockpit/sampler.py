"""Housekeeping's look at what the processes of this host have counted, every ten seconds: the flow of mail.

The differences to the last look are added in Redis, in one script with a note of how far they went, so that nothing is
added twice or left out, whether Redis is away meanwhile, its answer is lost, or this process is killed. A process that
begins to count anew has counted all that it shows. Mail pays nothing for this: what it counts is in memory already.
"""

from __future__ import annotations

import json
import socket
import threading
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger
from redis.exceptions import RedisError

from relay.ledger import changes, events, flow
from relay.mail import encryption
from relay.mail.stored import parsed
from relay.metric_store import Arena
from relay.repeated import Repeated

EVERY = 10.0
_NOTED = 4 << 20  # octets of a note, unpacked, at most: it comes from Redis

# Of each process, by the number of its region: field -> what it has counted.
Totals = dict[str, dict[str, int]]

# Samples of the metrics that are counted in the flow -> the field, with the labels put in.
_FIELDS = {
    "smtpdup_messages_total": "{result}",
    "smtpdup_accepted_bytes_total": "octets",
    "smtpdup_copies_lost_total": "lost",
    "smtpdup_spooled_total": "spooled",
    "smtpdup_largest_message_bytes": "largest",
    "smtpdup_most_recipients": "most",
    "smtpdup_mail_features_total": "uses {extension}",
    "smtpdup_primary_seconds_bucket": "seconds {le}",
    "smtpdup_server_seconds_bucket": "answered {le} {server}",
    "smtpdup_backup_seconds_bucket": "seconds {le} {destination}",
    "smtpdup_delivery_age_seconds_bucket": "age {le} {destination}",
    "smtpdup_copies_total": "copied {destination}",
    "smtpdup_deliveries_total": "{result} {destination}",
    "smtpdup_route_messages_total": "accepted {route} {server}",
    "smtpdup_route_refused_total": "refused {route} {server}",
    "smtpdup_failovers_total": "failovers {server}",
    "smtpdup_split_total": "split {how}",
}


def field_of(sample: str, labels: Mapping[str, str]) -> str | None:
    """Return the field of the flow that a sample of the metrics is counted in, None for one that is not."""
    if sample == "smtpdup_recipients_total":
        return "recipients" if labels["result"] == "accepted" else "recipients_refused"
    form = _FIELDS.get(sample)
    return form.format_map(labels) if form else None


def totals(arena: Arena) -> Totals:
    """Return what each process has counted so far."""
    found: Totals = {}
    for process, readings in arena.readings():
        counted = found.setdefault(str(process), {})
        for (sample, labels), value in readings:
            name = field_of(sample, dict(labels))
            if name is not None and value > 0:
                counted[name] = counted.get(name, 0) + int(value)
    return found


def difference(before: Totals, now: Totals) -> tuple[dict[str, int], dict[str, int]]:
    """Return what was counted in between: sums, and of the maxima those of processes that have had mail."""
    sums: dict[str, int] = {}
    maxima: dict[str, int] = {}
    for process, counted in now.items():
        known = before.get(process, {})
        for name, value in counted.items():
            if name in flow.MAXIMA:
                if counted.get("accepted") != known.get("accepted"):
                    maxima[name] = max(value, maxima.get(name, 0))
                continue
            last = known.get(name, 0)
            # What is less than it was began anew, and all of it is new.
            if more := value - last if value >= last else value:
                sums[name] = sums.get(name, 0) + more
    return sums, maxima


class Sampler:
    """Adds one installation's counts to the flow. ``is_fresh``: nobody of it has added any, unless a note says so."""

    def __init__(self, arena: Arena, *, is_fresh: bool) -> None:
        self._arena = arena
        self._before: Totals | None = {} if is_fresh else None
        self._is_certain = False  # whether ``_before`` is how far the ledger went

    def sample(self, connection: Any) -> None:
        """Look, and add. Raises RedisError."""
        if not self._is_certain:
            # A ledger that has no note of ours came back empty, or never had one: then we know best.
            note = _read(flow.base(connection, self._arena.identity))
            self._before = note if note is not None else self._before
            self._is_certain = True
        now = totals(self._arena)
        before = now if self._before is None else self._before
        for process in before.keys() - now.keys():
            now[process] = before[process]  # it cannot be read at the moment
        sums, maxima = difference(before, now)
        if sums or maxima or self._before is None:
            at = changes.now(connection)
            self._is_certain = False  # until Redis has said that it was added
            flow.add(connection, self._arena.identity, _note(now), sums, maxima, at)
            self._is_certain = True
        self._before = now


class EventTeller:
    """Brings the events of this installation's processes that are no success to the ledger."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._seen: dict[int, int] = {}

    def tell(self, connection: Any) -> None:
        """Tell what has come since the last time; what Redis does not take is not told again. Raises RedisError."""
        found = self._arena.new_events(self._seen)
        if found:
            with connection.pipeline(transaction=True) as pipe:
                events.add(pipe, socket.gethostname(), found, is_sealed=encryption.ring() is not None)
                pipe.execute()


def _note(counted: Totals) -> bytes:
    return zlib.compress(json.dumps(counted, separators=(",", ":")).encode(), 1)


def _read(note: bytes | None) -> Totals | None:
    """Read a note; what is none says nothing."""
    if note is None:
        return None
    try:
        found = parsed(zlib.decompressobj().decompress(note, _NOTED))
        return {
            str(process): {str(name): value for name, value in counted.items() if type(value) is int}
            for process, counted in found.items()
        }
    except (zlib.error, ValueError, AttributeError):
        return None


Step = Callable[[Any], None]


def keep_sampling(
    connection: Any, steps: Mapping[str, Step], stop: threading.Event, farewell: Mapping[str, Step]
) -> None:
    """Take each step every ten seconds, at the end once more, and then those of the farewell.

    One that fails is taken again at its next turn.
    """
    troubles = {name: Repeated(name, logger.warning, logger.info) for name in {**steps, **farewell}}
    is_last = False
    while True:
        for name, step in [*steps.items(), *(farewell.items() if is_last else ())]:
            try:
                step(connection)
            except (RedisError, OSError) as error:
                troubles[name].came(str(error))
            else:
                troubles[name].is_over()
        if is_last:
            return
        is_last = stop.wait(EVERY)
