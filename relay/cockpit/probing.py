"""What the answers of one probe of a server's recipients come to: the evidence that `ready` reads, and for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relay.cockpit.mailbox_probe import Exists, Probed
from relay.cockpit.probe_sources import Recipients
from relay.ledger import audit, probe_evidence
from relay.ledger.audit import Act
from relay.ledger.probe_evidence import MOST_EXAMPLES, REFUSALS, ProbeEvidence

ALL_WELL, SOME_NOT, CANNOT_TELL = "well", "some not", "cannot tell"


def evidence(asked: Recipients, answers: Mapping[str, Probed], why: str, at: float) -> ProbeEvidence:
    """Return what is known now; ``why`` it has ended early, if it has."""
    found = [answers[address] for address in asked.addresses if address in answers]
    tally = {result: sum(one.result is result for one in found) for result in Exists}
    domains = {_domain(one.address) for one in found}
    taken = [one for one in found if one.is_accepted]
    wrong = taken if asked.what == REFUSALS else [one for one in found if one.result in {Exists.NO, Exists.REFUSED}]
    wrong.sort(key=lambda one: one.result is not Exists.NO)  # those that do not exist first
    return ProbeEvidence(
        at=at,
        by=audit.operator(),
        source=asked.source,
        exist=tally[Exists.YES],
        missing=tally[Exists.NO],
        refused=tally[Exists.REFUSED],
        put_off=tally[Exists.PUT_OFF],
        untold=tally[Exists.UNTOLD],
        left=len(asked.addresses) - len(found),
        accepted=len(taken),
        domains=len(domains),
        open_domains=len({_domain(one.address) for one in taken if one.result is Exists.UNTOLD}),
        why=why,
        reply=next((one.text for one in found if one.result is Exists.REFUSED), ""),
        examples=tuple(one.address for one in wrong[:MOST_EXAMPLES]),
    )


def _domain(address: str) -> str:
    return address.rpartition("@")[2]


def outcome(what: str, found: ProbeEvidence) -> str:
    """Return whether the server is as it should be, some of them are not, or nobody can tell."""
    wrong = found.accepted if what == REFUSALS else found.missing + found.refused
    if wrong:
        return SOME_NOT
    return CANNOT_TELL if found.left + found.put_off + found.untold else ALL_WELL


def keep(connection: Any, name: str, route: str, asked: Recipients, found: ProbeEvidence) -> None:
    """Keep it for `ready`, and who has asked. Raises RedisError."""
    with connection.pipeline() as pipe:
        probe_evidence.tell(pipe, name, asked.what, route, found)
        parts = ", ".join(f"{word} {number:,}" for word, number in numbers(found) if number)
        details = {"recipients": asked.source, **({"route": route} if route else {})}
        audit.record(pipe, Act(f"probe {name}", after=parts or "nobody", reason=found.why, details=details))
        pipe.execute()


def numbers(found: ProbeEvidence) -> Iterator[tuple[str, int]]:
    """Yield each result and how often it came."""
    yield Exists.YES.value, found.exist
    yield Exists.NO.value, found.missing
    yield Exists.REFUSED.value, found.refused
    yield Exists.PUT_OFF.value, found.put_off
    yield Exists.UNTOLD.value, found.untold
    yield "not asked", found.left


def csv_lines(answers: Sequence[Probed]) -> Iterator[str]:
    """Yield the answers for the new server's administrator, as the export of those who have moved."""
    yield "address,result,accepted,reply"
    for one in answers:
        text = io.StringIO()
        accepted = "yes" if one.is_accepted else "no"
        csv.writer(text, lineterminator="").writerow([one.address, one.result.value, accepted, one.text])
        yield text.getvalue()
