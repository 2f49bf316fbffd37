"""Divergence: recipients whom the primary took and a backup answered otherwise, counted in groups of equal reasons.

A group is a destination, a kind, a stage of the transaction, the codes and the normalised text of the reply. Who is
open in which group stands in the CopyState of each copy, and how many are open in a group follows from there: every
script that changes or removes a state counts along (lua/occurrences.lua), so nothing is counted twice when an outcome
is written again. What a state does not say (texts, examples, hours) is added by ``note``, in front, in the same MULTI.
All of it is bounded, whatever a server says: 500 groups, the rest in ``other``; 200 recipients, 20 examples of each.
Where mail is sealed, a recipient is a pseudonym with the sealed address beside, and no reply is kept as it came.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from relay.ledger.changes import Pipe
from relay.ledger.copy_state import REPLY, CopyState, Groups
from relay.ledger.scripts import script
from relay.mail import encryption, refusal_class, reply_text
from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.mail.reply_text import Known
from relay.mail.text import printable

REFUSED, GIVEN_UP, DEFERRED, ACCEPTS_MORE, NOISE = "refused", "given-up", "deferred", "accepts-more", "noise"
KINDS = (REFUSED, GIVEN_UP, DEFERRED, NOISE, ACCEPTS_MORE)  # noise: deferred for a short time, which has ended
MAIL, RCPT, DATA, DOT, OWN = STAGES = ("MAIL", "RCPT", "DATA", "dot", "own")
MOST_GROUPS, MOST_WHOM, MOST_DOMAINS, MOST_OUTAGES = 500, 200, 100_000, 200
LETTERS = {REFUSED: "r", GIVEN_UP: "g", DEFERRED: "d", ACCEPTS_MORE: "m"}
OTHERS = {REFUSED: "other", ACCEPTS_MORE: "other", GIVEN_UP: "other-given-up", DEFERRED: "other-deferred"}
_WORD = 320  # characters of an address or a domain that are kept


class Answer(NamedTuple):
    """What a recipient of a copy met at the backup: the kind of divergence, the stage, and what was said.

    The stage ``own`` stands for words of ours. ``soft``: a refusal that ``soft_bounce`` makes a temporary one.
    """

    kind: str
    stage: str
    reply: Reply
    soft: bool = False


@dataclass(slots=True)
class Noted:
    """What one copy adds to one group."""

    key: str
    answer: Answer
    status: str
    text: str
    seen: list[int] = field(default_factory=list)  # recipients that were not counted in it before
    is_new: bool = True  # no other recipient of this copy was counted in it before


def key_of(destination: str, kind: str, stage: str, code: int, status: str, text: str) -> str:
    """Return the id of a group: 12 hex digits."""
    parts = "\0".join((destination, kind, stage, str(code), status, text))
    return hashlib.sha1(parts.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:12]


def count(
    state: CopyState, envelope: Envelope, destination: str, answers: Mapping[int, Answer], ours: Known
) -> tuple[CopyState, list[Noted]]:
    """Return the state of a copy with these answers counted, and what is to be noted with it.

    ``ours`` says our names and the server's; the envelope's words are added to it. Who is not among the answers is
    counted as before; whoever meets another reason is counted there and no longer where it was.
    """
    groups: dict[str, Noted] = {}
    found: dict[int, str] = {}
    known: dict[Answer, Noted] = {}
    for i, answer in answers.items():
        if answer not in known:
            status, text = reply_text.normalise(answer.reply, ours.of(envelope, i))
            key = key_of(destination, answer.kind, answer.stage, answer.reply.code, status, text)
            known[answer] = groups.setdefault(key, Noted(key, answer, status, text))
        found[i] = LETTERS[answer.kind] + known[answer].key
    opened, past = _turned(state, found)
    for group, counted in (*state.open, *state.past):
        if group[1:] in groups and counted:
            groups[group[1:]].is_new = False
    before = {(group, i) for group, counted in (*state.open, *state.past) for i in counted}
    for i, group in found.items():
        if (group, i) not in before:
            groups[group[1:]].seen.append(i)
    return replace(state, open=opened, past=past), [noted for noted in groups.values() if noted.seen]


def _turned(state: CopyState, found: Mapping[int, str]) -> tuple[Groups, Groups]:
    """Return who is counted where now, and where before."""
    opened: dict[str, list[int]] = {}
    past = {group: list(counted) for group, counted in state.past}
    for group, counted in state.open:
        for i in counted:
            if found.get(i, group) == group:
                opened.setdefault(group, []).append(i)
            else:
                past.setdefault(group, []).append(i)
    for i, group in found.items():
        counted_now = opened.setdefault(group, [])
        if i not in counted_now:
            counted_now.append(i)
    return _frozen(opened), _frozen(past)


def _frozen(groups: Mapping[str, Iterable[int]]) -> Groups:
    return tuple((group, tuple(sorted(set(counted)))) for group, counted in groups.items())


def note(
    pipe: Pipe,
    destination: str,
    envelope: Envelope,
    attempts: int,
    noted: Iterable[Noted],
    *,
    most: int = MOST_GROUPS,
) -> None:
    """Add what a copy says of groups, in front of the change of its state in the same MULTI.

    ``attempts`` is how often it had been tried before, by the state that is stored so far: what is written again adds
    nothing. Result: how many groups were added to.
    """
    records = (_record(destination, envelope, n) for n in noted)
    pipe.eval(script("diverge"), 0, destination, envelope.id, attempts, most, *records)


def _record(destination: str, envelope: Envelope, noted: Noted) -> str:
    answer = noted.answer
    is_sealed = encryption.is_on()
    recipients = [envelope.recipients[i] for i in noted.seen]
    domains: dict[str, int] = {}
    for recipient in recipients:
        domain = printable(recipient.domain)[:_WORD]
        domains[domain] = domains.get(domain, 0) + 1
    return json.dumps({
        "key": noted.key,
        "other": OTHERS[answer.kind],
        "kind": answer.kind,
        "stage": answer.stage,
        "code": answer.reply.code,
        "status": noted.status,
        "text": noted.text,
        "class": refusal_class.classify(answer.reply.code, noted.status, noted.text).name,
        "own": int(answer.stage == OWN),
        "soft": int(answer.soft),
        "reply": "" if is_sealed else answer.reply.text[:REPLY],
        "seen": len(recipients),
        "messages": int(noted.is_new),
        "whom": [_who(destination, recipient.address, is_sealed=is_sealed) for recipient in recipients],
        "domains": list(domains.items()),
    })  # fmt: skip


def _who(destination: str, address: str, *, is_sealed: bool) -> tuple[str, str]:
    word = printable(address.lower())[:_WORD]
    if not is_sealed:
        return word, ""
    return encryption.pseudonym(word), encryption.seal_word(place_of(destination), word)


def place_of(destination: str) -> str:
    """Return for what a recipient's address is sealed."""
    return f"divergence {destination}"


# Domains, and trouble with the server ---------------------------------------------------------------------------


class Coverage:
    """How many recipients of each domain a backup took, put off and refused; kept in memory between two writes."""

    def __init__(self, most: int = MOST_DOMAINS) -> None:
        self._most = most
        self._counts: dict[str, list[int]] = {}

    def add(self, domain: str, *, taken: int = 0, deferred: int = 0, refused: int = 0) -> None:
        counts = self._counts.get(domain)
        if counts is None:
            if len(self._counts) >= self._most:
                domain = "other"
            counts = self._counts.setdefault(domain, [0, 0, 0])
        counts[0] += taken
        counts[1] += deferred
        counts[2] += refused

    def take(self) -> dict[str, list[int]]:
        """Return what has come since the last call."""
        found, self._counts = self._counts, {}
        return found

    def give_back(self, counts: Mapping[str, list[int]]) -> None:
        """Keep what could not be written."""
        for domain, (taken, deferred, refused) in counts.items():
            self.add(domain, taken=taken, deferred=deferred, refused=refused)


def cover(pipe: Pipe, destination: str, counts: Mapping[str, list[int]], *, most: int = MOST_DOMAINS) -> None:
    """Write what a Coverage has counted. Result: how many domains."""
    parts = (part for domain, found in counts.items() for part in (printable(domain)[:_WORD], *found))
    pipe.eval(script("cover"), 0, destination, most, *parts)


def outage_begins(pipe: Any, destination: str, at: float, reason: str) -> Any:
    """Note that a destination is paused; one that is so already has another reason now. Result: how many are kept."""
    return pipe.eval(script("outage"), 0, destination, "1", f"{at:.3f}", printable(reason)[:REPLY], MOST_OUTAGES)


def outage_ends(pipe: Any, destination: str, at: float) -> Any:
    """Note that a destination works. Result: how many are kept."""
    return pipe.eval(script("outage"), 0, destination, "0", f"{at:.3f}", "", MOST_OUTAGES)
