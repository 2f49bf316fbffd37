"""Criteria about the backup as a server: how it is set, what it offers, and what was asked of it on purpose.

A criterion that is not asked for is None.
"""

from __future__ import annotations

from collections.abc import Iterator

from relay.client.server_limits import UNLIMITED, server_limits
from relay.cockpit.evidence import Evidence
from relay.cockpit.finding import Finding, fails, passes, unknown, warns
from relay.cockpit.formatting import count, octets, span
from relay.ledger.flow import Flow, total
from relay.ledger.greetings import Greeting

_CERTIFICATE_SECONDS = 30 * 86400.0


def as_it_is(e: Evidence) -> Finding:
    """It gets the mail that the primary gets, as it is."""
    found, given = e.restraint, e.destination
    texts = [f"held {found.held}"] if found.held else []
    texts += [f"throttled {found.throttled}"] if found.throttled else []
    if texts:
        return fails("; ".join(texts))
    if given is None:
        return unknown(f"the ledger does not say how {e.name} is set")
    if given.soft_bounce:
        return warns("soft_bounce is set: what it refuses counts as put off")
    if given.sender == "null":
        return warns("copies carry the null sender: what it says to real senders is not seen")
    return passes("gets every copy as it is")


def ehlo(e: Evidence) -> Finding:
    """It offers what mail needs that was seen, or that the old server takes."""
    new, old = e.new_greeting, e.old_greeting
    if new is None or old is None:
        return unknown(f"no EHLO of {e.name if new is None else e.old} has been seen yet: it comes with the next mail")
    seen = total(e.hours)
    lacks = list(_lacks(e, new, old, seen))
    if lacks:
        return fails("; ".join(lacks))
    doubts = list(_doubts(e))
    return (
        warns("; ".join(doubts))
        if doubts
        else passes(
            "offers all that mail seen has used"
            if seen.accepted
            else "no mail has been seen that it lacks anything for"
        )
    )


def size_limit(greeting: Greeting) -> int | None:
    """Return the largest message that a server says it takes; None: it does not say, or has no limit."""
    text = greeting.extensions.get("SIZE", "").strip()
    return int(text) if text.isascii() and text.isdigit() and 0 < len(text) < 19 and int(text) else None


def _lacks(e: Evidence, new: Greeting, old: Greeting, seen: Flow) -> Iterator[str]:
    limit, before = size_limit(new), size_limit(old)
    if limit is not None:
        if before is None or limit < before:
            larger = f"{e.old} takes {octets(before)}" if before else f"{e.old} names no limit"
            yield f"SIZE {octets(limit)}, {larger}"
        elif limit < seen.largest:
            yield f"SIZE {octets(limit)}, a message of {octets(seen.largest)} was seen"
    for name in ("SMTPUTF8", "8BITMIME", "DSN"):
        if name not in new.extensions and seen.uses.get(name):
            yield f"{name} is missing, {count(seen.uses[name], 'message')} needed it"
    if old.offers_tls and not new.offers_tls:
        yield f"STARTTLS is missing, {e.old} has it"
    most = server_limits(new.extensions).recipients
    if most < min(seen.most, UNLIMITED.recipients):
        yield f"RCPTMAX {most}, a message to {seen.most} recipients was seen"


def _doubts(e: Evidence) -> Iterator[str]:
    for reach in e.reaches:
        if reach.verified is False:
            yield f"tls = verify would refuse its certificate: {reach.why_unverified}"
            return
    ends = [reach.certificate_ends for reach in e.reaches if reach.certificate_ends]
    if ends and min(ends) - e.now < _CERTIFICATE_SECONDS:
        yield f"its certificate ends in {span(max(0.0, min(ends) - e.now))}"


def arrived(e: Evidence) -> Finding | None:
    """What it took is where its recipients read it."""
    if not e.ready.arrived_age:
        return None
    text = "mailboxes were never compared: this version has no command for it; ready.arrived_age = 0 takes this out"
    return unknown(text) if e.ready.require_arrived else warns(text)
