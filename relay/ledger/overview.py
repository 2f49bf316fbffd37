"""The ledger at a glance: what waits and has failed for each backup, and what it last turned out to be itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from relay.ledger import hosts
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
    state: str = "ok"  # "paused": the breaker is open; "held": an operator wants it so; "still": a worker is
    reason: str = ""
    paused: bool = False  # also while it is held
    held: bool = False


class Change(NamedTuple):
    """What the ledger last turned out to be: emptied, replaced, older; "" and 0 where it never did."""

    cause: str
    at: float


def _serves(child: str, destination: str) -> bool:
    """Say whether a child of that name, with its place behind a blank, delivers to this destination."""
    name = child.partition(" ")[0]
    return name == "worker-shared" or name.rpartition("-")[0] == f"worker-{destination}"


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
    heard = [host for host in hosts.read(connection) if host.age < hosts.LATE]
    still = [f"{child} at {host.host}" for host in heard for child in host.still]
    rows = []
    for name, (pending, oldest, retrying, failed, health) in zip(
        names, zip(*[iter(rest)] * 5, strict=True), strict=True
    ):
        found = Health.of(health)
        state, reason = found.describe(clock)
        idle = [child for child in still if _serves(child, name)] if state == "ok" else []
        if idle:
            state, reason = "still", "; ".join(filter(None, (f"{', '.join(idle)} stands still", reason)))
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
