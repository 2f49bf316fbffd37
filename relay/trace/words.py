"""By which words a message is found: its id, Message-ID, sender, recipients, their domains, both servers' queue ids.

A word has a letter for its kind in front. Addresses are found whatever their case. A queue id is any word of a reply
that looks like one: each server has its own way to say it. What an operator types may be of several kinds; what is
found by it is compared with the message's own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from relay.mail.ids import is_id
from relay.trace.events import (
    ACCEPTED,
    DEFERRED,
    FAILED,
    REFUSED,
    UNCERTAIN,
    Event,
    More,
    Received,
    Remark,
    Tried,
)

ID, MESSAGE_ID, SENDER, RECIPIENT, FROM_DOMAIN, TO_DOMAIN, QUEUE_ID, STATUS = "imftFTqs"
LOST = {"copy lost", "body missing", "damaged record"}  # events of the mail log after which a copy is not there
RARE = {REFUSED, FAILED, DEFERRED, UNCERTAIN, "lost"}  # what is told of few messages, and found by that

_STATUS_CODE = re.compile(r"\d{3}(?:[ -]\d\.\d{1,3}\.\d{1,3})?[ -]?")
_QUEUED_AS = re.compile(r"(?:queued (?:as|with id)|\bid|InternalId)[ =:]+<?([\w.+/-]{4,100})", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9](?:[\w.+/-]{3,98})[A-Za-z0-9=]")
_TOKENS = 4  # of one reply
_DIGIT = re.compile(r"\d")


def queue_ids(reply: str) -> list[str]:
    """Return what may be the queue id that a server gave in its reply to the dot."""
    front = _STATUS_CODE.match(reply)
    text = reply[front.end() : 400] if front else reply[:400]
    found = [named[1].rstrip(".-/") for named in _QUEUED_AS.finditer(text)]
    found += [token for token in _TOKEN.findall(text) if _DIGIT.search(token) and "@" not in token]
    return list(dict.fromkeys(found))[:_TOKENS]


def domain_of(address: str) -> str:
    """Return the domain of an address, in lower case; "" without one."""
    return address.rpartition("@")[2].lower() if "@" in address else ""


def of(event: Event) -> Iterator[str]:
    """Yield the words of an event, but for its message's id."""
    match event:
        case Received():
            yield from _of_received(event)
        case More():
            yield from _recipients(event.recipients)
        case Tried():
            for part in event.parts:
                if part.verdict in RARE:
                    yield STATUS + part.verdict
                else:
                    yield from (QUEUE_ID + word for word in queue_ids(part.reply))
        case Remark() if event.event in LOST:
            yield STATUS + "lost"


def _of_received(event: Received) -> Iterator[str]:
    yield SENDER + event.sender.lower()
    if domain := domain_of(event.sender):
        yield FROM_DOMAIN + domain
    yield from _recipients(event.recipients)
    yield from _recipients(tuple(refusal.recipient for refusal in event.refused))
    if event.message_id:
        yield MESSAGE_ID + event.message_id.strip("<>").lower()
    if event.outcome == ACCEPTED:
        yield from (QUEUE_ID + word for word in queue_ids(event.reply))
    else:
        yield STATUS + (UNCERTAIN if event.outcome == UNCERTAIN else REFUSED)


def _recipients(addresses: tuple[str, ...]) -> Iterator[str]:
    for address in addresses:
        yield RECIPIENT + address.lower()
        if domain := domain_of(address):
            yield TO_DOMAIN + domain


# What is asked for -----------------------------------------------------------------------------------------------


class NoWord(ValueError):
    """What was typed is nothing that can be looked for; the text says why."""


@dataclass(frozen=True, slots=True)
class Term:
    """One word of a question: of which kinds it may be, and as what it narrows: "id", "from", "to" or "address"."""

    role: str
    kinds: str
    value: str

    def words(self, pseudonym: Callable[[str], str] | None = None) -> frozenset[str]:
        """Return the words that it stands for, also as pseudonyms, where addresses are kept as such."""
        found = {kind + _cased(kind, self.value) for kind in self.kinds}
        if pseudonym is not None:
            found |= {kind + pseudonym(self.value).lower() for kind in self.kinds if kind in {SENDER, RECIPIENT}}
        return frozenset(found)


def _cased(kind: str, value: str) -> str:
    return value if kind in {ID, QUEUE_ID} else value.lower()


def read(text: str) -> Term:
    """Read what is typed: an id, <Message-ID>, address, @domain, queue id, from:... or to:... Raises NoWord."""
    text = text.strip()
    prefix, colon, rest = text.partition(":")
    if colon and prefix.lower() in {"from", "to"}:
        return _narrowed(prefix.lower(), rest.strip())
    if not text or len(text) > 1000:
        raise NoWord("a word to look for has 1 to 1000 characters")
    if text == "<>":
        return Term("from", SENDER, "")
    if text.startswith("@"):
        return Term("address", FROM_DOMAIN + TO_DOMAIN, _domain(text))
    bare = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if "@" in bare:
        return Term("address", SENDER + RECIPIENT + MESSAGE_ID, bare)
    kinds = (ID if is_id(bare) else "") + MESSAGE_ID + QUEUE_ID
    return Term("id", kinds if bare == text else MESSAGE_ID, bare)


def _narrowed(role: str, text: str) -> Term:
    address, domain = (SENDER, FROM_DOMAIN) if role == "from" else (RECIPIENT, TO_DOMAIN)
    bare = text[1:-1] if text.startswith("<") and text.endswith(">") else text
    if not bare and role == "from" and text:
        return Term(role, address, "")
    if not bare:
        raise NoWord(f"{role}: an address or @domain must follow")
    if bare.startswith("@") or ("@" not in bare and "." in bare):
        return Term(role, domain, _domain(bare))
    return Term(role, address, bare)


def _domain(text: str) -> str:
    domain = text.lstrip("@").rstrip(".")
    if not domain:
        raise NoWord("a domain must follow the @")
    return domain
