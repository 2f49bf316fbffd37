"""The life of one message, put together from its events and from where its copies stand in the ledger now.

``timeline`` tells it step by step, in the words of both servers. What the events do not say is not guessed: a copy of
which nobody has heard the end and that is in no list any more is "gone".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from relay.ledger.whereabouts import FAILED as IN_FAILED
from relay.ledger.whereabouts import WAITS, MessageWhereabouts, Whereabouts
from relay.mail.ids import made_at
from relay.mail.text import count
from relay.trace import events, search_terms
from relay.trace.events import Event, More, Received, Remark, Tried
from relay.trace.privacy import shown

DELIVERED, WAITING, FAILED, REFUSED, LOST, GONE = STATUSES = (
    "delivered", "waiting", "failed", "refused", "lost", "gone",
)  # fmt: skip
# What became of a step, for whoever colours it.
GOOD, LATER, BAD, PLAIN = "good", "later", "bad", "plain"
CLIENT, RELAY = "client", "relay"  # who is neither of the servers
_EXPIRED = "failed copy expired"
_BAD_NOTES = search_terms.LOST | {_EXPIRED, "not durable", "unreadable message"}
_SHOWN_RECIPIENTS = 5


@dataclass(frozen=True, slots=True)
class Step:
    """One step: ``who`` is CLIENT, RELAY, or a server by its name; ``seconds`` it took, if known.

    ``result``: good, later, bad or plain.
    """

    at: float
    who: str
    text: str
    seconds: float | None = None
    result: str = PLAIN


@dataclass(frozen=True, slots=True)
class CopyLife:
    """The copy for one backup: where it stands, after how many attempts, and what was said last; ``at`` is when."""

    destination: str
    status: str
    attempts: int
    reply: str
    at: float | None
    is_busy: bool = False
    held_until: float | None = None  # it is uncertain whether the primary has the message; then it goes out anyway


@dataclass(frozen=True)
class MessageLife:
    """A message: its events by time, and where it stands by the ledger (None: that was not asked)."""

    id: str
    events: tuple[Event, ...]
    now: MessageWhereabouts | None = None

    @cached_property
    def received(self) -> Received | None:
        """What the client heard, the last word on it; None where that is not kept, on another host or too long ago."""
        return next((event for event in reversed(self.events) if isinstance(event, Received)), None)

    @property
    def at(self) -> float:
        """When it was received, or is first heard of; seconds since the epoch."""
        return min([_begin(event) for event in self.events] or [made_at(self.id)])

    @property
    def sender(self) -> str:
        """The sender as it is shown; "" for the null sender, and where it is not known."""
        return shown(self.received.sender) if self.received else ""

    @cached_property
    def recipients(self) -> tuple[str, ...]:
        """All recipients that the primary accepted, as they are shown."""
        found = dict.fromkeys(self.received.recipients if self.received else ())
        for event in self.events:
            if isinstance(event, More):
                found |= dict.fromkeys(event.recipients)
        return tuple(map(shown, found))

    @property
    def message_id(self) -> str:
        """Its Message-ID with angle brackets, "" if it has none."""
        return self.received.message_id if self.received else ""

    @property
    def primary_reply(self) -> str:
        """What the primary said to it, "" where it said nothing or that is not kept."""
        found = self.received
        return found.reply if found and found.outcome in {events.ACCEPTED, events.REFUSED} else ""

    @cached_property
    def words(self) -> frozenset[str]:
        """The words by which it is found."""
        wires = map(events.stored, self.events)
        return frozenset({search_terms.ID + self.id, *(word for wire in wires for word in search_terms.of(wire))})

    @cached_property
    def destinations(self) -> tuple[str, ...]:
        """The backups that it has, had, or was to have copies for."""
        found = dict.fromkeys(self.received.copies if self.received else ())
        for event in self.events:
            if isinstance(event, Tried | Remark) and event.destination:
                found[event.destination] = None
        return tuple(found)

    @cached_property
    def copies(self) -> tuple[CopyLife, ...]:
        """Each backup's copy. Of a message that was not accepted there is none, unless some backup got it anyway."""
        return tuple(self._copy(name) for name in self.destinations if self._has_copy(name))

    def _has_copy(self, name: str) -> bool:
        if self.received is None or self.received.outcome in {events.ACCEPTED, events.UNCERTAIN}:
            return True
        return any(isinstance(event, Tried) and event.destination == name for event in self.events)

    def _copy(self, name: str) -> CopyLife:
        tries = [e for e in self.events if isinstance(e, Tried) and e.destination == name]
        notes = [e for e in self.events if isinstance(e, Remark) and e.destination in {name, ""}]
        last = tries[-1] if tries else None
        said = last.parts[-1].reply if last and last.parts else ""
        attempts = max((event.attempt for event in tries), default=0)
        now = self._whereabouts(name)
        if now and now.state == WAITS:
            return CopyLife(name, WAITING, max(attempts, now.attempts), now.last_reply or said, now.since, now.is_busy)
        if now and now.state == IN_FAILED:
            return CopyLife(name, FAILED, max(attempts, now.attempts), now.last_reply or said, now.since)
        if any(note.event in search_terms.LOST for note in notes):
            return CopyLife(name, LOST, attempts, said, None)
        if self.now and (self.now.is_staged or self.now.uncertain_until is not None):
            return CopyLife(name, WAITING, attempts, said, None, held_until=self.now.uncertain_until)
        if any(note.event == _EXPIRED for note in notes):
            return CopyLife(name, FAILED, attempts, said, last.at if last else None)
        if last is None:
            is_spooled = now is None or self._is_spooled
            return CopyLife(name, WAITING if is_spooled else GONE, attempts, said, None)
        if all(part.verdict == events.DELIVERED for part in last.parts):
            return CopyLife(name, DELIVERED, attempts, said, last.at)
        verdicts = {part.verdict for part in last.parts}
        if events.DEFERRED in verdicts:
            return CopyLife(name, WAITING if now is None else GONE, attempts, said, last.at)
        return CopyLife(name, FAILED if now is None else GONE, attempts, said, last.at)

    def _whereabouts(self, name: str) -> Whereabouts | None:
        return self.now.copies.get(name) if self.now else None

    @property
    def _is_spooled(self) -> bool:
        """Whether its copies were in a spool when they were last heard of."""
        noted = {event.event for event in self.events if isinstance(event, Remark)}
        staged = self.received.stage if self.received else ""
        return (staged == events.IN_SPOOL or "spooled" in noted) and "unspooled" not in noted

    @cached_property
    def status(self) -> str:
        """What it has come to, the worst of its copies: lost, failed, waiting, gone, delivered; or refused."""
        found = self.received
        states = {copy.status for copy in self.copies}
        for state in (LOST, FAILED, WAITING, GONE):
            if state in states:
                return state
        if DELIVERED in states:
            return DELIVERED
        if found is None:
            return WAITING if self.now and (self.now.is_staged or self.now.uncertain_until) else GONE
        if found.outcome in {events.REFUSED, events.OWN, events.BROKEN_OFF}:
            return REFUSED
        return DELIVERED if found.outcome == events.ACCEPTED else GONE

    def timeline(self) -> list[Step]:
        """Return its steps, the first one first."""
        steps: list[Step] = []
        spooled = next((e.text for e in self.events if isinstance(e, Remark) and e.event == "spooled"), "")
        is_uncertain = any(isinstance(e, Received) and e.outcome == events.UNCERTAIN for e in self.events)
        for event in self.events:
            if isinstance(event, Received):
                steps += _of_received(event, spooled)
            elif isinstance(event, Tried):
                steps += _of_tried(event)
            elif isinstance(event, Remark) and not (
                (event.event == "spooled" and self.received) or (event.event == "uncertain" and is_uncertain)
            ):
                steps.append(_of_noted(event))
        # A step of the end has its length; those before it are known to be before it.
        return sorted(steps, key=lambda step: step.at)


def assemble(
    found: Mapping[str, Iterable[Event]], now: Mapping[str, MessageWhereabouts] | None = None
) -> list[MessageLife]:
    """Return the lives of messages, by their ids; an event that is there twice counts once."""
    return [
        MessageLife(message_id, tuple(sorted(dict.fromkeys(some), key=_order)), now.get(message_id) if now else None)
        for message_id, some in found.items()
    ]


def _begin(event: Event) -> float:
    """Return when what an event tells of began."""
    return event.at - event.seconds - event.stage_seconds if isinstance(event, Received) else event.at


def _order(event: Event) -> tuple[float, int]:
    # Of the same moment: first what the client heard.
    return event.at, 0 if isinstance(event, Received | More) else 1


def _of_received(event: Received, spooled: str) -> Iterator[Step]:
    end = event.at
    dot = end - event.seconds
    begin = dot - event.stage_seconds
    by = RELAY if event.outcome == events.OWN else event.primary
    client = event.client or "unknown"
    helo = f" ({event.helo})" if event.helo else ""
    yield Step(begin, CLIENT, f"{client}{helo}")
    sender = f"MAIL FROM:<{shown(event.sender)}>"
    if event.refused_at == "MAIL":
        yield Step(end, by, f"{sender}: {event.reply}", result=_result(event.reply))
        return
    yield Step(begin, event.primary, f"{sender}: {event.mail_reply}" if event.mail_reply else sender)
    yield from _recipients(event, begin)
    if event.refused_at == "RCPT":
        return
    if event.refused_at == "DATA":
        yield Step(end, by, f"DATA: {event.reply}", result=_result(event.reply))
        return
    octets = f"{event.size} octets"
    if event.outcome == events.BROKEN_OFF:
        yield Step(end, CLIENT, "it broke off before the end of the message", result=BAD)
        return
    if event.outcome == events.OWN:
        yield Step(end, RELAY, f"refused, {octets}: {event.reply}", result=_result(event.reply))
        return
    if event.stage == events.IN_REDIS:
        yield Step(dot, RELAY, f"{octets}; the copy is in Redis", event.stage_seconds)
    elif event.stage == events.IN_SPOOL:
        why = f": {spooled}" if spooled else ""
        yield Step(dot, RELAY, f"{octets}; the copy is in the spool{why}", event.stage_seconds, LATER)
    elif event.copies:
        yield Step(dot, RELAY, f"{octets}; the copy could not be stored", event.stage_seconds or None, BAD)
    else:
        yield Step(dot, RELAY, f"{octets}; no copies")
    late = ", the client had gone" if event.is_late else ""
    if event.outcome == events.UNCERTAIN:
        text = f"no reply to the dot: {event.reply}" if event.reply else "no reply to the dot"
        yield Step(end, event.primary, f"{text}; the client heard 451", event.seconds, LATER)
    else:
        yield Step(end, event.primary, f"the dot: {event.reply}{late}", event.seconds, _result(event.reply))


def _recipients(event: Received, at: float) -> Iterator[Step]:
    accepted = [shown(address) for address in event.recipients]
    replies = event.rcpt_replies
    if len(replies) == len(accepted) > 1:
        for address, reply in zip(accepted[:_SHOWN_RECIPIENTS], replies, strict=False):
            yield Step(at, event.primary, f"RCPT TO:<{address}>: {reply}")
    elif accepted:
        reply = f": {replies[0]}" if replies else ""
        for address in accepted[:_SHOWN_RECIPIENTS]:
            yield Step(at, event.primary, f"RCPT TO:<{address}>{reply}")
    elif event.count:
        reply = f": {replies[0]}" if replies else ""
        yield Step(at, event.primary, f"RCPT, {count(event.count, 'recipient')}{reply}")
    if event.count > _SHOWN_RECIPIENTS < len(accepted):
        yield Step(at, event.primary, f"and {count(event.count - _SHOWN_RECIPIENTS, 'more recipient')}")
    for refusal in event.refused:
        result = _result(refusal.reply)
        who = RELAY if refusal.is_own else event.primary
        yield Step(at, who, f"RCPT TO:<{shown(refusal.recipient)}>: {refusal.reply}", result=result)


def _of_tried(event: Tried) -> Iterator[Step]:
    for part in event.parts:
        whom = ", ".join(f"<{shown(address)}>" for address in part.recipients[:_SHOWN_RECIPIENTS])
        if (more := part.number - min(len(part.recipients), _SHOWN_RECIPIENTS)) and part.recipients:
            whom += f" and {more} more"
        if not part.recipients and part.number > 1:
            whom = count(part.number, "recipient")
        attempt = f"attempt {event.attempt}, " if event.attempt > 1 or part.verdict != events.DELIVERED else ""
        again = ""
        if part.verdict == events.DEFERRED and event.next_seconds is not None:
            again = f"; again in {round(event.next_seconds)} s"
        result = {events.DELIVERED: GOOD, events.DEFERRED: LATER}.get(part.verdict, BAD)
        about = f"{part.verdict}{f' for {whom}' if whom else ''}"
        yield Step(event.at, event.destination, f"{attempt}{about}: {part.reply}{again}", event.seconds, result)


def _of_noted(event: Remark) -> Step:
    text = f"{event.event}: {event.text}" if event.text else event.event
    result = BAD if event.event in _BAD_NOTES else LATER if event.event in {"uncertain", "may repeat"} else PLAIN
    return Step(event.at, event.destination or RELAY, text, result=result)


def _result(reply: str) -> str:
    return {"2": GOOD, "4": LATER}.get(reply[:1], BAD)
