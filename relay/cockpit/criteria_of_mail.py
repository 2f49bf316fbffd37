"""Criteria about the mail that a backup got: how long and how much, what it answered, and how soon.

A criterion that is not asked for is None.
"""

from __future__ import annotations

from collections.abc import Iterator

from relay.cockpit.evidence import Evidence, Missing, OpenGroup
from relay.cockpit.finding import Finding, fails, passes, unknown, warns
from relay.cockpit.formatting import count, duration, hour_of_week, some, span
from relay.ledger.flow import Flow
from relay.mail.text import printable

_DAY = 86400.0
_FEW = 10  # recipients put off, or messages of a domain, that say nothing yet
_NOTHING = "nothing seen yet: no copy has been delivered to {}"
_SLOW_FLOOR = 0.5  # seconds: what is faster is fast enough, however fast the other is


def hours_watched(e: Evidence) -> Iterator[Flow]:
    """Yield the hours of the window, from the first one on in which the backup got a copy."""
    begin = e.now - (e.ready.days or 35) * _DAY
    seen = False
    for hour in e.hours:
        seen = seen or e.name in hour.destinations
        if seen and hour.start + hour.length > begin:
            yield hour


def watched(e: Evidence) -> Finding | None:
    """Copies have come for long enough."""
    if not e.ready.days:
        return None
    if e.first is None:
        return fails(f"no copy has come to {e.name} yet")
    age, wanted = e.now - e.first, f"{e.ready.days} d"
    if age < e.ready.days * _DAY:
        return fails(f"watched for {span(age)} of {wanted}")
    return passes(f"watched for {span(age)}, {wanted} wanted")


def volume(e: Evidence) -> Finding | None:
    """Enough copies met their end."""
    wanted = e.ready.min_messages
    if not wanted:
        return None
    seen = sum(hour.of(e.name).seen for hour in hours_watched(e))
    text = f"{count(seen, 'message')} in {e.ready.days or 35} d, {wanted:,} wanted"
    return passes(text) if seen >= wanted else fails(text)


def busiest_hour(e: Evidence) -> Finding | None:
    """Copies came in the hour of the week with most mail, by its mean."""
    if not e.ready.busiest_hour:
        return None
    counts: dict[str, list[int]] = {}
    for hour in e.hours:
        if hour.accepted:
            counts.setdefault(hour_of_week(hour.start), []).append(hour.accepted)
    if not counts:
        return unknown("the primary has had no mail in 35 d, so its busiest hour is not known")
    busiest = max(counts, key=lambda name: sum(counts[name]) / len(counts[name]))
    if any(hour_of_week(hour.start) == busiest and hour.of(e.name).seen for hour in hours_watched(e)):
        return passes(f"{busiest}, your busiest hour, has been seen")
    return fails(f"{busiest}, your busiest hour, has not been seen")


def _groups(groups: list[OpenGroup]) -> str:
    ordered = sorted(groups, key=lambda group: -group.recipients)
    return some([f"{group.text} ({group.recipients:,})" for group in ordered])


def refusals(e: Evidence) -> Finding:
    """Nothing that the primary takes is refused for good."""
    found = e.refusals
    if isinstance(found, Missing):
        return unknown(found.why)
    groups = [group for group in found.groups if group.recipients > 0]
    recipients = sum(group.recipients for group in groups)
    noted = f"; {count(found.acknowledged, 'group')} acknowledged" if found.acknowledged else ""
    if not recipients:
        if e.first is None and not found.acknowledged:
            return unknown(_NOTHING.format(e.name))
        return passes(f"nothing that {e.old} takes is refused{noted}")
    text = f"{count(recipients, 'recipient')} in {count(len(groups), 'group')}: {_groups(groups)}{noted}"
    if recipients <= e.ready.max_open:
        return warns(f"{text}; ready.max_open allows {e.ready.max_open:,}")
    return fails(f"{text}; `smtp-dup divergence`")


def deferrals(e: Evidence) -> Finding:
    """Little is put off for long; what was delivered after all is worth a warning."""
    found = e.deferrals
    if isinstance(found, Missing):
        return unknown(found.why)
    share = 100 * found.open / max(found.seen, found.open, 1)
    if found.open >= _FEW and share > e.ready.max_deferred:
        text = f"{count(found.open, 'recipient')} put off for over an hour, {share:.1f} %"
        return fails(f"{text}; {e.ready.max_deferred} % allowed")
    if found.delivered:
        part = 100 * found.delivered / max(found.seen, found.delivered)
        later = f"{part:.1f} % put off at first (greylisting?), delivered soon after"
        return warns(f"{later}; {found.open:,} still put off") if found.open else warns(f"{later}")
    if found.open:
        return warns(f"{count(found.open, 'recipient')} put off for over an hour")
    return unknown(_NOTHING.format(e.name)) if e.first is None else passes("nothing is put off for over an hour")


def backlog(e: Evidence) -> Finding:
    """No copy waits for long, and few have."""
    if e.summary is None:
        return unknown(f"the ledger knows no backup {e.name}")
    if e.summary.pending and e.summary.oldest_age_s > e.ready.max_age:
        return fails(f"oldest waits {span(e.summary.oldest_age_s)}, {count(e.summary.pending, 'copy', 'copies')} wait")
    ages = e.day.of(e.name).age
    slowest = ages.quantile(0.99)
    if slowest is not None and slowest > e.ready.max_age_p99:
        return fails(
            f"1 of 100 copies of the last 24 h was delivered after more than {span(slowest)}; "
            f"{span(e.ready.max_age_p99)} allowed"
        )
    return passes(f"{count(e.summary.pending, 'copy waits', 'copies wait')}, none for long")


def outages(e: Evidence) -> Finding:
    """The server could be reached, and took mail."""
    if e.summary is not None and e.summary.state == "paused":
        return fails(f"paused now: {e.summary.reason or 'no reason is known'}")
    if not e.ready.calm:
        return passes("not paused; past pauses do not count")
    found = e.outages
    if isinstance(found, Missing):
        return unknown(found.why)
    recent = [o for o in found if not o.end or o.end > e.now - e.ready.calm]
    if not recent:
        return passes(f"not paused for {span(e.ready.calm)}")
    lost = sum((o.end or e.now) - o.begin for o in recent)
    last = max(recent, key=lambda o: o.end or e.now)
    ago = f"{span(e.now - last.end)} ago" if last.end else "now"
    return fails(f"paused {count(len(recent), 'time')}, {span(lost)} in all, last {ago}: {printable(last.reason)}")


def speed(e: Evidence) -> Finding | None:
    """Its replies to the dot take no longer than they may."""
    if not e.ready.max_slower:
        return None
    names = e.compared or [e.old]
    others = some(list(names))
    new, old = e.day.of(e.name).seconds.quantile(0.95), e.day.seconds_of(names).quantile(0.95)
    if new is None or old is None:
        return unknown(f"no reply of {e.name if new is None else others} to a message in the last 24 h")
    text = f"95 of 100 replies: {e.name} within {duration(new)}, {others} {duration(old)}"
    if new > max(_SLOW_FLOOR, e.ready.max_slower * old):
        return fails(f"{text}; {e.ready.max_slower} times allowed")
    return passes(text)


def domains(e: Evidence) -> Finding:
    """Mail for every domain has been delivered."""
    limited = e.destination.domains if e.destination else ()
    found = e.domains
    if limited:
        every = f" of {len(found)}" if not isinstance(found, Missing) and len(found) > len(limited) else ""
        which = f"{len(limited)}{every} domains" if every else count(len(limited), "domain")
        return fails(f"gets {which} by its settings: {some(list(limited))}")
    if isinstance(found, Missing):
        return unknown(found.why)
    never = [name for name, d in sorted(found.items()) if not d.delivered and d.others >= _FEW]
    if never:
        return fails(f"{len(never)} of {len(found)} domains never reached {e.name}: {some(never)}")
    reached = sum(1 for d in found.values() if d.delivered)
    if not reached:
        return unknown(_NOTHING.format(e.name))
    rest = f"; too few messages for {len(found) - reached:,} more to tell" if reached < len(found) else ""
    return passes(f"mail for {count(reached, 'domain')} has reached {e.name}{rest}")
