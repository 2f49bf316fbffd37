"""The 17 criteria by which a backup is ready to be the primary, or not.

Each has a function from what is known to what it comes to, None where it is not asked for. Its text is one line for
people, with the numbers that it is about; rules and settings stand in docs/readiness.md, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from relay.cockpit.criteria_of_hosts import in_the_air, relays, way_back
from relay.cockpit.criteria_of_mail import (
    backlog,
    busiest_hour,
    deferrals,
    domains,
    outages,
    refusals,
    speed,
    volume,
    watched,
)
from relay.cockpit.criteria_of_probes import probed, takes_more
from relay.cockpit.criteria_of_servers import arrived, as_it_is, ehlo
from relay.cockpit.evidence import Evidence
from relay.cockpit.finding import Finding


@dataclass(frozen=True, slots=True)
class Criterion:
    """One criterion: its number and name, its rule in words, the settings that it heeds, and the function."""

    number: int
    name: str
    rule: str
    settings: tuple[str, ...]
    judge: Callable[[Evidence], Finding | None]


CRITERIA: tuple[Criterion, ...] = (
    Criterion(1, "watched", "It has got copies for some days.", ("ready.days",), watched),
    Criterion(2, "volume", "It has taken or refused enough copies in these days.",
              ("ready.min_messages", "ready.days"), volume),
    Criterion(3, "busiest hour", "It got copies in that hour of the week in which the primary has most mail.",
              ("ready.busiest_hour", "ready.days"), busiest_hour),
    Criterion(4, "refusals", "It refuses no recipient or message that the primary takes, but for what is acknowledged.",
              ("ready.max_open",), refusals),
    Criterion(5, "deferrals", "It does not put off for over an hour more than a small share, or 10 recipients.",
              ("ready.max_deferred",), deferrals),
    Criterion(6, "backlog", "No copy waits for long now, and 99 of 100 of the last 24 hours were delivered soon.",
              ("ready.max_age", "ready.max_age_p99"), backlog),
    Criterion(7, "outages", "It has not been paused lately: it could be reached, and took mail.",
              ("ready.calm",), outages),
    Criterion(8, "as it is", "It is neither held nor throttled, and gets every message as the primary does.",
              (), as_it_is),
    Criterion(9, "speed", "It answers a message, of any route, not much later than the primary, or within 0.5 s.",
              ("ready.max_slower",), speed),
    Criterion(10, "EHLO", "It offers what the primary offers and mail seen has used, and takes messages as large.",
              (), ehlo),
    Criterion(11, "domains", "Mail for every domain with 10 messages or more has reached it.", (), domains),
    Criterion(12, "recipients probed", "A probe has found that every recipient exists there.",
              ("ready.probe_age",), probed),
    Criterion(13, "takes no more", "It refuses the recipients that the primary refuses; else it only warns.",
              ("ready.probe_age",), takes_more),
    Criterion(14, "arrived", "What it took is in the mailboxes; that nobody has compared them is a warning.",
              ("ready.arrived_age", "ready.require_arrived"), arrived),
    Criterion(15, "relays", "Every relay process lives, has the newest settings and roles, and reaches the server.",
              ("ready.check_every", "ready.days"), relays),
    Criterion(16, "in the air", "No message lacks its copy, is uncertain for too long, or is in a spool for a minute.",
              ("ready.days", "relay.uncertain_hold"), in_the_air),
    Criterion(17, "way back", "The primary takes MAIL from every host with workers: it will be a backup.",
              ("ready.check_every",), way_back),
)  # fmt: skip
