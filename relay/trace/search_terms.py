"""By which words a message is found: its id, Message-ID, sender, recipients, their domains, both servers' queue ids.

A word has a letter for its kind in front. Addresses are found whatever their case. A queue id is any word of a reply
that looks like one: each server has its own way to say it. What an operator types may be of several kinds; what is
found by it is compared with the message's own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from relay.mail.ids import is_id
from relay.trace.events import (
    ACCEPTED,
    DELIVERED,
    MORE,
    RECEIVED,
    REFUSED,
    REMARKED,
    TRIED,
    UNCERTAIN,
    Wire,
)

ID, MESSAGE_ID, SENDER, RECIPIENT, FROM_DOMAIN, TO_DOMAIN, QUEUE_ID, STATUS = "imftFTqs"
LOST = {"copy lost", "body missing", "damaged record"}  # events of the mail log after which a copy is not there

# A queue id: as it is announced, or any word of five characters or more that has a digit and is no status code.
_QUEUE_ID = re.compile(
    r"(?:\bqueued (?:as|with id)|\bid)[ =:]+<?([\w.+/-]{4,100})"
    r"|(?<![\w.+/@-])(?!\d\.\d{1,3}\.\d{1,3}(?![\w.]))(?=[A-Za-z.+/_-]{0,40}\d)([A-Za-z0-9][\w.+/-]{4,100})(?![\w@])",
    re.IGNORECASE,
)
_TOKENS = 4  # of one reply
_READ = 400  # characters of a reply


def queue_ids(reply: str) -> list[str]:
    """Return what may be the queue id that a server gave in its reply to the dot."""
    found = {(named or word).rstrip(".-/"): None for named, word in _QUEUE_ID.findall(reply[:_READ])}
    return list(found)[:_TOKENS]


def of(wire: Wire) -> list[str]:
    """Return the words of an event, as it is sent or stored, but for its message's id.

    This is done for every message: it takes the lists as they are. Raises what a list that is none of ours raises.
    """
    kind = wire[0]
    if kind == RECEIVED:
        return _of_received(wire)
    found: list[str] = []
    if kind == TRIED:
        for verdict, _, _, reply in wire[6]:
            if verdict == DELIVERED:
                found += [QUEUE_ID + word for word in queue_ids(_text(reply))]
            else:
                found.append(STATUS + verdict)
    elif kind == MORE:
        for recipient in wire[3]:
            _add(found, recipient if type(recipient) is str else recipient[0], RECIPIENT, TO_DOMAIN)
    elif kind == REMARKED and wire[3] in LOST:
        found.append(STATUS + "lost")
    return found


def _of_received(wire: Wire) -> list[str]:
    found: list[str] = []
    _add(found, wire[4], SENDER, FROM_DOMAIN)
    for recipient in wire[5]:
        _add(found, recipient if type(recipient) is str else recipient[0], RECIPIENT, TO_DOMAIN)
    for refusal in wire[6]:
        _add(found, refusal[0], RECIPIENT, TO_DOMAIN)
    if message_id := wire[10]:
        found.append(MESSAGE_ID + message_id.strip("<>").lower())
    outcome = wire[3]
    if outcome == ACCEPTED:
        found += [QUEUE_ID + word for word in queue_ids(_text(wire[15]))]
    else:
        found.append(STATUS + (UNCERTAIN if outcome == UNCERTAIN else REFUSED))
    return found


def _add(found: list[str], address: str, kind: str, of_domain: str) -> None:
    address = address.lower()
    found.append(kind + address)
    at = address.rfind("@")
    if at >= 0:
        found.append(of_domain + address[at + 1 :])


def _text(reply: Any) -> str:
    """Return the text of a reply behind its code."""
    if type(reply) is list:
        return " ".join(reply[1])
    return reply[4:] if reply else ""


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
