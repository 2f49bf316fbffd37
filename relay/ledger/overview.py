"""The ledger at a glance: what waits and has failed for each backup, and what it last turned out to be itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from relay.ledger.health import Health
from relay.ledger.health import moment as moment_of
from relay.ledger.keys import COUNTERS, DESTINATIONS, FAILED, HEALTH, LEDGER, OWN, PENDING
from relay.mail import ids
from relay.mail.stored import LARGEST, figure, moment


@dataclass(frozen=True, slots=True)
class Summary:
    """One backup at a glance. ``oldest_age_s`` is in seconds, 0 when nothing is pending."""

    destination: str
    pending: int
    oldest_age_s: float
    retrying: int
    failed: int
    delivered: int
    state: str = "ok"  # or "paused": the breaker is open; or "held": an operator wants it so
    reason: str = ""
    paused: bool = False  # also while it is held
    held: bool = False


class Change(NamedTuple):
    """What the ledger last turned out to be: emptied, replaced, older; "" and 0 where it never did."""

    cause: str
    at: float


def change(connection: Any) -> Change:
    """Return what the ledger last turned out to be, and when."""
    cause, at = connection.hmget(LEDGER, "cause", "doubt")
    return Change((cause or b"").decode("ascii", "replace"), moment_of(at) or 0.0)


def summary(connection: Any) -> list[Summary]:
    """Return one Summary per destination that is or was used."""
    names = sorted(ids.names(connection.hkeys(DESTINATIONS)))
    pipe = connection.pipeline(transaction=False)
    pipe.time()
    pipe.hgetall(COUNTERS)
    for name in names:
        pipe.zcard(PENDING + name)
        pipe.zrange(PENDING + name, 0, 0, withscores=True)
        pipe.hlen(OWN + name)
        pipe.zcard(FAILED + name)
        pipe.hgetall(HEALTH + name)
    (seconds, micros), counters, *rest = pipe.execute()
    clock = float(seconds) + micros / 1e6
    rows = []
    for name, (pending, oldest, retrying, failed, health) in zip(
        names, zip(*[iter(rest)] * 5, strict=True), strict=True
    ):
        found = Health.of(health)
        state, reason = found.describe(clock)
        rows.append(
            Summary(
                destination=name,
                pending=pending,
                oldest_age_s=round(max(0.0, clock - moment(oldest[0][1])), 1) if oldest else 0.0,
                retrying=retrying,
                failed=failed,
                delivered=int(figure(counters.get(f"delivered:{name}".encode()), LARGEST)),
                state=state,
                reason=reason,
                paused=found.is_paused,
                held=found.is_held(clock),
            )
        )
    return rows
