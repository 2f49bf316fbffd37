"""Which copies an operator means: conditions joined by "and", and the copies of a list that meet them, page by page.

A page costs what its conditions ask for: ids and times come from the list itself, replies and attempts from the states
of the copies, and only what is asked of an envelope reads that. Pages go by time, and never past what was there at the
beginning: what is tried again and comes back is not met twice. Ids are looked up, however long the list is. An
envelope that cannot be read, as with a key that is not here, meets no condition about it; a page says whose and why.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from redis import Redis

from relay.batches import batched
from relay.ledger import changes, keys, queries
from relay.ledger.copy_state import FRESH, CopyState
from relay.ledger.health import Health
from relay.ledger.queries import UnknownId
from relay.mail.addresses import Network, within
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope

PAGE = 1000
_SKEW = 5.0  # seconds between two clocks of ours: a message may have been received before Redis says it was accepted
_CODE = re.compile(r"[2-5][0-9x]{0,2}|[245]\.\d{1,3}\.\d{1,3}")
_ATTEMPTS = re.compile(r"(<=|>=|<|>|=)?\s*(\d{1,9})")
_COMPARED = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq}
_STATUS = re.compile(r"\d{3}[ -](\d\.\d{1,3}\.\d{1,3})(?![\d.])")


class Which(NamedTuple):
    """One of the two lists that a destination has: its keys, and what is said of an id that is not in it."""

    scores: str
    states: str
    absent: str


WAITING = Which(keys.PENDING, keys.OWN, "does not wait")
FAILED = Which(keys.FAILED, keys.FAILURE, "not in the failed list")


class Attempts(NamedTuple):
    """How often a copy must have been tried: ``>3``, ``<=2``, or ``3`` for just as often."""

    sign: str
    number: int

    @classmethod
    def read(cls, text: str) -> Attempts:
        """Read it. Raises ValueError."""
        found = _ATTEMPTS.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"expected a number of attempts such as 3, '>3' or '<=2', not {text!r}")
        return cls(found[1] or "=", int(found[2]))

    def takes(self, attempts: int) -> bool:
        return bool(_COMPARED[self.sign](attempts, self.number))


def code(text: str) -> str:
    """Read what a reply is to begin with: 550, 55x, 5, or the enhanced status 5.1.1. Raises ValueError."""
    found = text.strip().lower()
    if not _CODE.fullmatch(found):
        raise ValueError(f"expected a reply code such as 550, 5xx or 5.1.1, not {text!r}")
    return found


@dataclass(frozen=True, slots=True)
class Filter:
    """What a copy must be like; a condition that is not given lets all pass.

    Ages are in seconds, since what the listings show: when a copy that waits was received, when a failed one failed.
    An address that begins with @ stands for everybody in that domain, ``<>`` is the null sender; letters are not told
    apart by case. Recipients are those that the copy is owed to, or that failed. ``limit`` is no condition: it takes
    the first ones, 0 for all.
    """

    ids: Collection[str] = ()
    destination: str | None = None
    group: str | None = None
    reply: str | None = None
    code: str | None = None
    domain: str | None = None
    recipient: str | None = None
    sender: str | None = None
    client: tuple[Network, ...] = ()
    older: float | None = None
    newer: float | None = None
    larger: int | None = None
    attempts: Attempts | None = None
    limit: int = field(default=0, compare=False)

    @property
    def is_empty(self) -> bool:
        """Whether it has no condition."""
        return self == _NONE

    @property
    def is_bare(self) -> bool:
        """Whether it has neither a condition nor a limit."""
        return self.is_empty and not self.limit

    @property
    def is_destination_alone(self) -> bool:
        """Whether it asks for nothing but, perhaps, a destination."""
        return self == Filter(destination=self.destination) and not self.limit

    @property
    def asks_state(self) -> bool:
        return (self.group, self.reply, self.code, self.attempts) != (None, None, None, None)

    def asks_envelope(self, which: Which) -> bool:
        about_mail = (self.domain, self.recipient, self.sender, self.larger) != (None, None, None, None)
        return about_mail or bool(self.client) or (which is WAITING and (self.older, self.newer) != (None, None))

    def takes_state(self, state: CopyState, reason: str) -> bool:
        """Say whether a copy's state passes; ``reason`` is the last reply of one that was not tried yet."""
        return (
            self.takes_words(state.last_reply or reason)
            and (self.attempts is None or self.attempts.takes(state.attempts))
            and (self.group is None or any(self.group in {group, group[1:]} for group, _ in state.open))
        )

    def takes_words(self, reply: str) -> bool:
        """Say whether a reply passes."""
        return (self.code is None or _has_code(reply, self.code)) and (
            self.reply is None or self.reply.casefold() in reply.casefold()
        )

    def takes_recipients(self, recipients: Sequence[str]) -> bool:
        """Say whether the condition on a recipient is met by one of these."""
        return self.recipient is None or any(_matches(self.recipient, r) for r in recipients)

    def takes_domains(self, recipients: Sequence[str]) -> bool:
        """Say whether the condition on a domain is met by one of these recipients, or @domains."""
        return self.domain is None or any(_matches(f"@{self.domain}", r) for r in recipients)

    def takes_envelope(self, envelope: Envelope, recipients: Sequence[str]) -> bool:
        """Say whether a copy's envelope passes, but for its age."""
        return (
            (self.sender is None or _matches(self.sender, envelope.sender))
            and self.takes_recipients(recipients)
            and self.takes_domains(recipients)
            and (self.larger is None or envelope.size > self.larger)
            and (not self.client or within(envelope.client_address, self.client))
        )

    def takes_age(self, seconds: float) -> bool:
        """Say whether a copy of that age passes."""
        return (self.older is None or seconds >= self.older) and (self.newer is None or seconds <= self.newer)


_NONE = Filter()


def _has_code(reply: str, wanted: str) -> bool:
    if "." in wanted:
        status = _STATUS.match(reply)
        return status is not None and status[1] == wanted
    digits = reply[:3]
    is_code = len(digits) == 3 and digits.isascii() and digits.isdecimal() and reply[3:4] in {"", " ", "-"}
    return is_code and all(w in {"x", d} for w, d in zip(wanted, digits, strict=False))


def _matches(wanted: str, address: str) -> bool:
    wanted, address = wanted.casefold(), address.casefold()
    if wanted == "<>":
        return not address
    return address.endswith(wanted) if wanted.startswith("@") else address == wanted


# The copies -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A copy that passes. State and envelope are there where they were asked for."""

    id: str
    score: float  # in the list, as it was read
    state: CopyState
    envelope: Envelope | None


class ListPlace(NamedTuple):
    """A place in a list: behind this copy of this destination."""

    destination: str
    score: float
    id: str


class Page(NamedTuple):
    """What passes of so many copies of one destination, and why envelopes could not be read, by their ids.

    ``end`` is behind the last one that was looked at.
    """

    target: Destination
    health: Health
    looked_at: int
    found: list[Found]
    unread: dict[str, str]
    end: ListPlace


def size(connection: Redis, which: Which, chosen: Filter) -> int:
    """Return how many copies `select` would look at, at most. Raises UnknownDestination."""
    targets = queries.destinations(connection, chosen.destination)
    if chosen.ids:
        return len(chosen.ids) * len(targets)
    clock = changes.now(connection)
    low, high = _range(which, chosen, clock)
    return sum(int(connection.zcount(which.scores + target.name, low, high)) for target in targets)


def select(
    connection: Redis, which: Which, chosen: Filter, *, whole: bool = False, after: ListPlace | None = None
) -> Iterator[Page]:
    """Yield the copies of a list that pass, per destination, the oldest first; ``whole``: each with its envelope.

    With ids all of them are looked for first. ``after`` goes on behind a place. Raises UnknownId, UnknownDestination.
    """
    targets = queries.destinations(connection, chosen.destination)
    if chosen.ids:
        _look_for(connection, which, chosen, targets)
    clock = changes.now(connection)
    left = chosen.limit or math.inf
    for target in targets:
        if after and target.name < after.destination:
            continue
        health = Health.read(connection, target.name)
        behind = after if after and target.name == after.destination else None
        for listed in _pages(connection, which, target.name, chosen, clock, behind):
            # Redis orders by score, then by id.
            page = [(i, score) for i, score in listed if not behind or (score, i) > (behind.score, behind.id)]
            if not page:
                continue
            result = _passing(connection, which, chosen, (target, health), page, clock, whole=whole)
            if len(result.found) > left:
                del result.found[int(left) :]
            left -= len(result.found)
            yield result
            if left <= 0:
                return


def _look_for(connection: Redis, which: Which, chosen: Filter, targets: Sequence[Destination]) -> None:
    missing, every = set(chosen.ids), list(dict.fromkeys(chosen.ids))
    for target in targets:
        for ids in batched(every, PAGE):
            scores = connection.zmscore(which.scores + target.name, ids)
            missing.difference_update(i for i, score in zip(ids, scores, strict=True) if score is not None)
    if missing:
        where = f" at {chosen.destination}" if chosen.destination else ""
        raise UnknownId(f"{which.absent}{where}: {', '.join(i for i in chosen.ids if i in missing)}")


def _range(which: Which, chosen: Filter, clock: float) -> tuple[float, float]:
    """Return the lowest and highest score that can pass."""
    low = -math.inf if chosen.newer is None else clock - chosen.newer - (_SKEW if which is WAITING else 0)
    high = math.inf if chosen.older is None or which is WAITING else clock - chosen.older
    return low, high


def _pages(
    connection: Redis, which: Which, name: str, chosen: Filter, clock: float, behind: ListPlace | None
) -> Iterator[list[tuple[str, float]]]:
    key = which.scores + name
    if chosen.ids:
        for ids in batched(list(dict.fromkeys(chosen.ids)), PAGE):
            scores = connection.zmscore(key, ids)
            if page := [(i, score) for i, score in zip(ids, scores, strict=True) if score is not None]:
                yield page
        return
    last = cast("list[tuple[bytes, float]]", connection.zrevrange(key, 0, 0, withscores=True))
    if not last:
        return
    low, high = _range(which, chosen, clock)
    low = max(low, behind.score) if behind else low
    # A page that all of passes need be no larger than what is wanted of it.
    is_bare = not (chosen.asks_state or chosen.asks_envelope(which))
    count = min(PAGE, chosen.limit) if is_bare and chosen.limit else PAGE
    yield from queries.pages(connection, key, since=low, until=min(high, last[0][1]), size=count)


def _passing(
    connection: Redis,
    which: Which,
    chosen: Filter,
    where: tuple[Destination, Health],
    page: Sequence[tuple[str, float]],
    clock: float,
    *,
    whole: bool,
) -> Page:
    target, health = where
    reason = health.reason if which is WAITING else ""
    asks_envelope = chosen.asks_envelope(which)
    rows = [Found(message_id, score, FRESH, None) for message_id, score in page]
    if which is FAILED:
        rows = [row for row in rows if chosen.takes_age(clock - row.score)]
    if rows and (whole or asks_envelope or chosen.asks_state):
        data = cast("list[bytes | None]", connection.hmget(which.states + target.name, [row.id for row in rows]))
        rows = [row._replace(state=CopyState.from_wire(d)) for row, d in zip(rows, data, strict=True)]
        if chosen.asks_state:
            rows = [row for row in rows if chosen.takes_state(row.state, reason)]
    unread: dict[str, str] = {}
    if rows and (whole or asks_envelope):
        envelopes = queries.envelopes(connection, [row.id for row in rows], unread)
        rows = [row._replace(envelope=envelope) for row, envelope in zip(rows, envelopes, strict=True)]
        if asks_envelope:
            rows = [row for row in rows if _envelope_passes(which, chosen, target, row, clock)]
    last_id, last_score = page[-1]
    return Page(target, health, len(page), rows, unread, ListPlace(target.name, last_score, last_id))


def _envelope_passes(which: Which, chosen: Filter, target: Destination, row: Found, clock: float) -> bool:
    if row.envelope is None:
        return False
    recipients = queries.addressees(row.envelope, target, row.state)
    is_aged = which is FAILED or chosen.takes_age(clock - row.envelope.received_at)
    return is_aged and chosen.takes_envelope(row.envelope, recipients)
