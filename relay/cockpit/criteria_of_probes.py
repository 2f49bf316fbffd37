"""Criteria about what `smtp-dup probe` has found: whom the new server knows, and takes although the old one refuses.

A probe of another week says nothing of today. A criterion that is not asked for is None.
"""

from __future__ import annotations

from dataclasses import replace

from relay.cockpit.evidence import Evidence
from relay.cockpit.finding import Finding, Result, fails, passes, unknown, warns
from relay.cockpit.formatting import count, some, span
from relay.ledger.probe_evidence import ProbeEvidence

_WORST = (Result.FAIL, Result.UNKNOWN, Result.PASS)


def probed(e: Evidence) -> Finding | None:
    """The recipients are known there."""
    if not e.ready.probe_age:
        return None
    fresh = [one for one in e.probed if _is_fresh(e, one)]
    if not fresh:
        again = f"`smtp-dup probe {e.name} --recipients FILE`"
        if not e.probed:
            return unknown(f"never probed: {again}")
        last = min(_age(e, one) for one in e.probed)
        return replace(unknown(f"probed {span(last)} ago, {span(e.ready.probe_age)} is the limit: {again}"), age=last)
    # Of a list and of whom mail came for, the worse one counts, and of two alike that of more recipients.
    found = [replace(_probed(e, one), age=_age(e, one)) for one in sorted(fresh, key=lambda one: -one.asked)]
    return min(found, key=lambda one: _WORST.index(one.result))


def _probed(e: Evidence, found: ProbeEvidence) -> Finding:
    when, asked = f"{span(_age(e, found))} ago ({found.source})", found.asked
    wrong = []
    if found.missing:
        wrong.append(f"{_do(found.missing, asked, 'does not exist', 'do not exist')} at {e.name}")
    if found.refused:
        said = f" ({found.reply})" if found.reply else ""
        wrong.append(f"{_do(found.refused, asked, 'is refused', 'are refused')} for another reason{said}")
    if wrong:
        return fails(f"{'; '.join(wrong)}, probed {when}{_examples(found)}")
    if not asked:
        return unknown(f"nobody was asked about, {when}")
    if found.left:
        return unknown(f"{_do(found.left, asked, 'was not asked about', 'were not asked about')}: {found.why}")
    if found.put_off:
        return unknown(f"{_do(found.put_off, asked, 'was put off', 'were put off')} {when}, also later")
    if found.untold:
        return unknown(
            f"whether {found.untold:,} of {count(asked, 'recipient')} exist cannot be told: {_why_untold(e, found)}; "
            "compare its mailboxes by other means, then ready.probe_age = 0 takes this out"
        )
    return passes(f"{count(asked, 'recipient exists', 'recipients exist')} at {e.name}, probed {when}")


def takes_more(e: Evidence) -> Finding | None:
    """Whom the old server refuses, it refuses; it is a warning at most, once anything was asked."""
    if not e.ready.probe_age:
        return None
    command = f"`smtp-dup probe {e.name} --refused`"
    if e.probed_refusals is not None and _is_fresh(e, e.probed_refusals):
        return replace(_takes_more(e, e.probed_refusals), age=_age(e, e.probed_refusals))
    for found in sorted(e.probed, key=lambda one: (-one.open_domains, -one.at)):
        if _is_fresh(e, found) and found.domains:
            # In each domain somebody was asked about first whom nobody can be.
            text = f"whom {e.old} refuses was not asked about: {command}; {e.name} refuses whom nobody can be"
            text = f"{_takes_anybody(e, found)} (catch-all?)" if found.open_domains else text
            return replace(warns(text), age=_age(e, found))
    return unknown(f"not known whether {e.name} takes whom {e.old} refuses: {command}")


def _takes_more(e: Evidence, found: ProbeEvidence) -> Finding:
    asked, when = found.asked, f"probed {span(_age(e, found))} ago"
    if found.accepted:
        text = f"{e.name} accepts {found.accepted:,} of {count(asked, 'recipient')} that {e.old} refuses (catch-all?)"
        return warns(f"{text}, {when}{_examples(found)}")
    if untold := found.left + found.put_off + found.untold:
        why = f": {found.why}" if found.why else ""
        return warns(f"of {count(asked, 'recipient')} that {e.old} refuses {untold:,} could not be told, {when}{why}")
    if not asked:
        return passes(f"{e.old} has refused no recipient that the trace has, {when}")
    return passes(f"{e.name} refuses what {e.old} refuses, {count(asked, 'recipient')} {when}")


def _age(e: Evidence, found: ProbeEvidence) -> float:
    return max(0.0, e.now - found.at)


def _is_fresh(e: Evidence, found: ProbeEvidence) -> bool:
    return _age(e, found) <= e.ready.probe_age


def _do(number: int, asked: int, one: str, many: str) -> str:
    """Return "14 of 2,300 do not exist"."""
    return f"{number:,} of {asked:,} {one if number == 1 else many}"


def _examples(found: ProbeEvidence) -> str:
    return f": {some(list(found.examples))}" if found.examples else ""


def _why_untold(e: Evidence, found: ProbeEvidence) -> str:
    return _takes_anybody(e, found) if found.open_domains else f"{e.name} does not offer SMTPUTF8"


def _takes_anybody(e: Evidence, found: ProbeEvidence) -> str:
    return f"{e.name} accepts anybody in {found.open_domains:,} of {count(found.domains, 'domain')}"
