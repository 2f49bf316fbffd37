"""The events of a message's life: as the processes send them, as they are stored, and as who looks reads them.

An event is a JSON list: its kind, the message id, when (milliseconds since the epoch by this host's clock), and the
fields of its class, in their order; lengths of time are microseconds. A reply is a text, or a list of code and lines.
What is stored is not trusted: one that makes no sense is none. A later version adds fields at the end of a list.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from relay.mail.envelope import Envelope
from relay.mail.ids import is_destination_name, is_id
from relay.mail.reply import Reply
from relay.mail.stored import any_text, number
from relay.mail.text import printable

RECEIVED, MORE, TRIED, REMARKED = "m", "t", "d", "e"  # kinds, see the classes
ACCEPTED, REFUSED, OWN, UNCERTAIN, BROKEN_OFF = "accepted", "refused", "own", "uncertain", "broken off"
OUTCOMES = frozenset({ACCEPTED, REFUSED, OWN, UNCERTAIN, BROKEN_OFF})
IN_REDIS, IN_SPOOL, NOWHERE = "redis", "spool", ""  # where a copy was staged
DELIVERED, DEFERRED, FAILED = "delivered", "deferred", "failed"
_VERDICTS = frozenset({DELIVERED, DEFERRED, FAILED})

AT_ONCE = 500  # recipients in one event; the others come in further ones
_TEXT = 1000  # characters of a text that are kept

Wire = list[Any]


class Refusal(NamedTuple):
    """A recipient that the primary, or a rule of the relay (``is_own``), refused, and with which reply."""

    recipient: str
    reply: str
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class Received:
    """What the client heard of a message: the primary leg, from MAIL to the reply to the dot.

    ``outcome``: accepted or refused by the primary, refused by a rule of the relay (own), uncertain (the dot without a
    reply), or broken off. ``seconds`` is the time from the dot to the reply, ``stage_seconds`` that of storing the copy
    at ``stage``: redis, spool or "". ``stages`` of MAIL, RCPT or DATA: ``refused_at`` is the one that ended it, "" for
    the dot. ``rcpt_replies`` are those to the accepted recipients, one if all are equal. ``copies`` are the backups.
    """

    id: str
    at: float
    outcome: str
    sender: str = ""
    recipients: tuple[str, ...] = ()
    refused: tuple[Refusal, ...] = ()
    client: str = ""
    helo: str = ""
    size: int = 0
    message_id: str = ""
    stage: str = NOWHERE
    stage_seconds: float = 0.0
    primary: str = ""
    seconds: float = 0.0
    reply: str = ""
    refused_at: str = ""
    mail_reply: str = ""
    rcpt_replies: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    is_late: bool = False
    count: int = 0  # recipients, also where their addresses are not kept
    route: str = ""  # names of the routes that its recipients took, with commas


@dataclass(frozen=True, slots=True)
class More:
    """Further recipients of a message that has very many."""

    id: str
    at: float
    recipients: tuple[str, ...]


class Part(NamedTuple):
    """What a backup said of some recipients of a copy: delivered, deferred or failed; how many, and who."""

    verdict: str
    number: int
    recipients: tuple[str, ...]
    reply: str


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt to deliver a copy to a backup, and what it said; ``seconds`` is the time from the dot to its reply.

    ``attempt`` counts from 1; ``next_seconds``: for those deferred, until the next try. ``is_own``: the relay says it.
    """

    id: str
    at: float
    destination: str
    attempt: int
    seconds: float | None
    parts: tuple[Part, ...]
    next_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Remark:
    """Anything else that the mail log says about a message: its event there, the destination if any, and the reason."""

    id: str
    at: float
    event: str
    destination: str = ""
    text: str = ""


Event = Received | More | Tried | Remark
_KINDS: dict[type[Event], str] = {Received: RECEIVED, More: MORE, Tried: TRIED, Remark: REMARKED}
_LENGTHS_OF_TIME = {RECEIVED: (12, 14), TRIED: (5,)}  # where they stand in a list of this kind


# As they are sent ------------------------------------------------------------------------------------------------


def received(
    outcome: str,
    envelope: Envelope,
    refused: Sequence[tuple[str, Reply, bool]],
    stage: str,
    stage_seconds: float,
    primary: str,
    seconds: float,
    reply: Reply | None,
    refused_at: str,
    mail_reply: Reply | None,
    rcpt_replies: Sequence[Reply],
    *,
    is_late: bool = False,
) -> list[Wire]:
    """Return the events for the end of a message at the primary, as they are sent: one, but for very many people."""
    recipients = envelope.recipients
    now = int(time.time() * 1000)
    first: Wire = [
        RECEIVED,
        envelope.id,
        now,
        outcome,
        envelope.sender,
        recipients if len(recipients) <= AT_ONCE else recipients[:AT_ONCE],
        refused,
        envelope.client_address,
        envelope.client_helo,
        envelope.size,
        envelope.message_id,
        stage,
        int(stage_seconds * 1e6),
        primary,
        int(seconds * 1e6),
        _said(reply),
        refused_at,
        _said(mail_reply),
        [*map(_said, rcpt_replies[:AT_ONCE])],
        envelope.destinations,
        is_late,
        len(recipients),
    ]
    if envelope.route:
        first.append(envelope.route)
    if len(recipients) <= AT_ONCE:
        return [first]
    further = range(AT_ONCE, len(recipients), AT_ONCE)
    return [first, *([MORE, envelope.id, now, recipients[n : n + AT_ONCE]] for n in further)]


def tried(
    message_id: str,
    destination: str,
    attempt: int,
    seconds: float | None,
    parts: Sequence[tuple[str, int, Sequence[str], Reply | str]],
    next_seconds: float | None = None,
) -> Wire:
    """Return the event of an attempt, as it is sent."""
    said = [(verdict, count, names, _said(reply)) for verdict, count, names, reply in parts]
    return [
        TRIED,
        message_id,
        int(time.time() * 1000),
        destination,
        attempt,
        None if seconds is None else int(seconds * 1e6),
        said,
        None if next_seconds is None else int(next_seconds),
    ]


def noted(message_id: str, at: float, event: str, destination: str, text: str) -> Wire:
    """Return the event of a line of the mail log, as it is sent."""
    return [REMARKED, message_id, int(at * 1000), event, destination, text]


@lru_cache(maxsize=100)  # all but the reply to the dot are the same for message after message
def _said(reply: Reply | str | None) -> Any:
    """Return a reply as it is sent: nearly always it has one line."""
    if reply is None or isinstance(reply, str):
        return reply
    return f"{reply[0]} {reply[1][0]}" if len(reply[1]) == 1 else reply


# As they are read ------------------------------------------------------------------------------------------------


def read(found: object) -> Event | None:
    """Read an event, as sent or as stored; None for what is none."""
    try:
        if not isinstance(found, list) or not is_id(found[1]) or not 0 <= number(found[2]) < 1e14:
            return None
        at = found[2] / 1000
        match found[0]:
            case "m":
                return _received(found, at)
            case "t":
                return More(found[1], at, _addresses(found[3]))
            case "d":
                return _tried(found, at)
            case "e":
                destination = found[4] if is_destination_name(found[4]) else ""
                return Remark(found[1], at, _text(found[3]), destination, _text(found[5]))
    except (IndexError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    return None


def _received(found: list[Any], at: float) -> Received:
    outcome = _text(found[3])
    if outcome not in OUTCOMES:
        raise ValueError("no outcome")
    recipients = _addresses(found[5])
    replies = tuple(map(reply_text, _list(found[18])))
    return Received(
        id=found[1],
        at=at,
        outcome=outcome,
        sender=_text(found[4]),
        recipients=recipients,
        refused=tuple(Refusal(_text(r[0]), reply_text(r[1]), r[2] is True) for r in _list(found[6])),
        client=_text(found[7]),
        helo=_text(found[8]),
        size=int(number(found[9])),
        message_id=_text(found[10]),
        stage=_text(found[11]),
        stage_seconds=number(found[12]) / 1e6,
        primary=_text(found[13]),
        seconds=number(found[14]) / 1e6,
        reply=reply_text(found[15]),
        refused_at=_text(found[16]),
        mail_reply=reply_text(found[17]),
        rcpt_replies=replies[:1] if len(set(replies)) == 1 else replies,
        copies=tuple(name for name in _list(found[19]) if is_destination_name(name)),
        is_late=found[20] is True,
        count=int(number(found[21])),
        route=_text(found[22]) if len(found) > 22 else "",
    )


def _tried(found: list[Any], at: float) -> Tried:
    if not is_destination_name(found[3]):
        raise ValueError("no destination")
    return Tried(
        id=found[1],
        at=at,
        destination=found[3],
        attempt=int(number(found[4])),
        seconds=None if found[5] is None else number(found[5]) / 1e6,
        parts=tuple(map(_part, _list(found[6]))),
        next_seconds=None if found[7] is None else number(found[7]),
    )


def _part(found: list[Any]) -> Part:
    verdict = _text(found[0])
    if verdict not in _VERDICTS:
        raise ValueError("no verdict")
    return Part(verdict, int(number(found[1])), _addresses(found[2]), reply_text(found[3]))


def stored(event: Event) -> Wire:
    """Return an event as it is stored: its kind, then its fields in their order."""
    wire: Wire = [_KINDS[type(event)], *(getattr(event, name) for name in event.__slots__)]
    wire[2] = round(event.at * 1000)
    for n in _LENGTHS_OF_TIME.get(wire[0], ()):
        wire[n] = None if wire[n] is None else round(wire[n] * 1e6)
    if isinstance(event, Received) and not event.route:
        del wire[-1]
    return wire


def _list(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _text(value: object) -> str:
    return any_text(value)[:_TEXT]


def _addresses(value: object) -> tuple[str, ...]:
    """Read addresses: texts, or recipients with their parameters behind."""
    return tuple(_text(one if isinstance(one, str) else one[0]) for one in _list(value))


def reply_text(value: object) -> str:
    """Read a reply: a text, a list of code and lines, or None where there was none."""
    if value is None:
        return ""
    if isinstance(value, str):
        return printable(value.rstrip()[:_TEXT])
    code, lines = _list(value)
    text = f"{int(number(code))} {' '.join(map(any_text, _list(lines)))}"
    return printable(text.rstrip())[:_TEXT]
