"""Criteria about our own hosts: whether a promotion would be followed everywhere, lose nothing, and have a way back.

A criterion that is not asked for is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from relay.cockpit.criteria_of_mail import hours_watched
from relay.cockpit.evidence import Evidence
from relay.cockpit.finding import Finding, fails, passes, unknown, warns
from relay.cockpit.formatting import count, some, span
from relay.ledger.hosts import LATE, Reach

_SPOOL_SECONDS = 60.0
_FRESH_SECONDS = 300.0  # a look may take a minute or two where a server is slow to greet


def relays(e: Evidence) -> Finding:
    """Every relay process lives, follows the last decision, and reaches the new server from its host."""
    if not e.relays:
        return fails("no relay process is heard of")
    troubles = [f"{r.label} last heard {span(r.age)} ago" for r in e.relays if not r.is_alive]
    troubles += [f"{r.label}: {r.trouble}" for r in e.relays if r.is_alive and r.trouble]
    living = [r for r in e.relays if r.is_alive]
    epochs = {r.epoch for r in living}
    if len(epochs) > 1:
        late = [r.label for r in living if r.epoch < max(epochs)]
        troubles.append(f"does not follow the last decision yet: {some(late)}")
    troubles += _other_settings(e)
    if e.ready.check_every:
        troubles += [f"{r.host} {r.text}" for r in _fresh(e, e.reaches, relaying=True) if not r.ok]
    if troubles:
        return fails("; ".join(troubles))
    unchecked = _unchecked(e, e.reaches, relaying=True) if e.ready.check_every else []
    if unchecked:
        return unknown(f"{some(unchecked)} has not connected to {e.name} yet: within {span(e.ready.check_every)}")
    remarks = list(e.differences)
    if turns := sum(hour.failovers.get(e.name, 0) for hour in hours_watched(e)):
        times = count(turns, "time", "times")
        remarks.append(f"another server of its route had to answer in its place {times} in {e.ready.days or 35} d")
    if remarks:
        return warns("; ".join(remarks))
    checked = f", {e.name} is reached from each" if e.ready.check_every else ""
    return passes(f"{count(len(living), 'relay process', 'relay processes')}, same settings{checked}")


def _other_settings(e: Evidence) -> Iterator[str]:
    """Yield the processes with older settings than others of their host."""
    newest: dict[str, int] = {}
    for relay in e.relays:
        host = relay.label.rpartition("/")[0]
        newest[host] = max(newest.get(host, 0), relay.generation)
    for relay in e.relays:
        if relay.is_alive and relay.generation < newest[relay.label.rpartition("/")[0]]:
            yield f"{relay.label} has older settings than others of its host"


def _places(e: Evidence, *, relaying: bool) -> dict[str, str]:
    """Return the places of the hosts that relay, or deliver, and their names."""
    return {h.place: h.host for h in e.hosts if (h.relays if relaying else h.delivers)}


def _fresh(e: Evidence, reaches: Sequence[Reach], *, relaying: bool) -> list[Reach]:
    places = _places(e, relaying=relaying)
    return [r for r in reaches if r.place in places and r.age <= max(_FRESH_SECONDS, 3 * e.ready.check_every)]


def _unchecked(e: Evidence, reaches: Sequence[Reach], *, relaying: bool) -> list[str]:
    known = {r.place for r in _fresh(e, reaches, relaying=relaying)}
    return [host for place, host in _places(e, relaying=relaying).items() if place not in known]


def in_the_air(e: Evidence) -> Finding:
    """No message lacks its copy, is uncertain for too long, or waits in a spool."""
    lost = sum(hour.lost for hour in hours_watched(e))
    texts = []
    if lost:
        texts.append(f"{count(lost, 'message was', 'messages were')} accepted without a copy in {e.ready.days or 35} d")
    if e.uncertain_late_s > _SPOOL_SECONDS:
        texts.append(f"a message has been uncertain for {span(e.uncertain_late_s)} longer than relay.uncertain_hold")
    silent = [h for h in e.hosts if h.age > LATE]
    texts += [f"{h.host} last heard {span(h.age)} ago, its spool is not known" for h in silent]
    texts += [
        f"the spool of {h.host} holds {count(h.spool_messages, 'message')}, the oldest {span(h.spool_oldest_s)} old"
        for h in e.hosts
        if h not in silent and h.spool_messages and h.spool_oldest_s > _SPOOL_SECONDS
    ]
    if texts:
        return fails("; ".join(texts))
    if not any(h.relays for h in e.hosts):
        return unknown("no relay host has said what its spool holds yet: within 30 s")
    return passes("nothing is lost, uncertain for long, or in a spool")


def way_back(e: Evidence) -> Finding | None:
    """The old server takes MAIL from the hosts that would deliver to it."""
    if not e.ready.check_every:
        return None
    troubles = [f"{e.old} from {r.host}: {r.text}" for r in _fresh(e, e.old_reaches, relaying=False) if not r.ok]
    if troubles:
        return fails("; ".join(troubles))
    if not any(h.delivers for h in e.hosts):
        return unknown("no host with workers is heard of")
    unchecked = _unchecked(e, e.old_reaches, relaying=False)
    if unchecked:
        return unknown(
            f"{some(unchecked)} has not said MAIL to {e.old} yet: within {span(e.ready.check_every)}, "
            "if its settings name that server"
        )
    return passes(f"{e.old} takes MAIL from every host with workers")
