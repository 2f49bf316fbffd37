"""A look-up over several hosts: each keeps the trace of its own processes, and answers what the others ask of it.

Questions and answers go through Redis (relay/ledger/questions.py). Who does not answer within three seconds is named
and not asked again by this look-up. A host answers with events, so that whoever asks can put a life together whose
message came to one host and whose copy left from another. Raises nothing; without Redis there are no others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError

from relay.config.model import Settings
from relay.ledger import hosts, questions
from relay.mail.ids import are_ids
from relay.mail.stored import any_text, moment, number
from relay.mail.text import printable
from relay.redisio.blocking import Blocking
from relay.repeated import Backoff, Repeated
from relay.stopping import StopEvent
from relay.trace import events
from relay.trace.events import Event
from relay.trace.life import STATUSES, MessageLife
from relay.trace.lookup import Query, Reader, Unseen, find, lives
from relay.trace.recipients import SeenRecipients
from relay.trace.search_terms import Term

PATIENCE = 3.0  # seconds for the answers
_READING_PATIENCE = 15.0  # for the next part where all of a trace is read
_LISTEN_SECONDS = 1.0
_MOST_LIMIT = 1000
_PART = 512 << 10  # octets of an answer's part, about
_READ_AT_ONCE = 5000  # events for each part, where recipients are asked for
_ROLES = {"id", "from", "to", "address"}


class OtherHosts:
    """The hosts that this one can ask: those whose housekeeping lives. ``own`` is the place of this one."""

    def __init__(self, connection: Any, own: str, unseen: Unseen) -> None:
        self._connection = connection
        self._unseen = unseen
        self._places: dict[str, str] = {}
        try:
            known = hosts.read(connection)
        except (RedisError, OSError) as error:
            unseen.no_ledger = str(error)
            return
        self._places = {h.place: h.host for h in known if h.age < hosts.LATE and h.place != own}

    @classmethod
    def of_settings(cls, settings: Settings, connection: Any, unseen: Unseen) -> Self:
        """Return the hosts beside that of these settings, for a command or the page."""
        own = hosts.place_of(settings.state_dir, settings.redis.url or "unix:")  # without a URL it is our own Redis
        return cls(connection, own, unseen)

    def __bool__(self) -> bool:
        return bool(self._places)

    def matching(self, query: Query) -> dict[str, list[Event]]:
        """Return what other hosts have of messages that may be meant."""
        # What a message has come to is known to nobody alone.
        status = None if query.terms else query.status
        return self._ask({
            "find": [[term.role, term.kinds, term.value] for term in query.terms],
            "since": query.since,
            "until": query.until if math.isfinite(query.until) else None,
            "status": status,
            "limit": query.limit if query.status is None else _MOST_LIMIT,
        })  # fmt: skip

    def of(self, ids: Sequence[str]) -> dict[str, list[Event]]:
        """Return what other hosts have of these messages."""
        wanted = set(ids)
        found = self._ask({"ids": list(ids)})
        return {message_id: some for message_id, some in found.items() if message_id in wanted}

    def recipients(self, since: float, found: SeenRecipients) -> None:
        """Add the recipients that other hosts remember since then."""
        done: set[str] = set()  # a host of an older version says that it has answered, and nothing

        def take(place: str, part: Any) -> None:
            found.add_accepted(_texts(part, "accepted"))
            found.add_refused(_texts(part, "refused"))
            if isinstance(part, dict) and part.get("done") is True:
                done.add(place)
                found.hashed += part["hashed"] if isinstance(part.get("hashed"), int) else 0
                found.is_cut |= part.get("cut") is True

        self._answers({"recipients": since}, take, _READING_PATIENCE, for_each=True)
        self._unseen.silent += [self._places.pop(place) for place in set(self._places) - done]

    def _ask(self, asked: dict[str, Any]) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {}

        def take(_place: str, part: Any) -> None:
            for one in _list(part, "events"):
                if (event := events.read(one)) is not None:
                    found.setdefault(event.id, []).append(event)

        self._answers(asked, take, PATIENCE)
        return found

    def _answers(
        self, asked: dict[str, Any], take: Callable[[str, Any], None], seconds: float, *, for_each: bool = False
    ) -> None:
        """Ask the hosts, and give each part of their answers, with its host's place, to ``take``."""
        missing = set(self._places)
        if not missing:
            return
        try:
            reply_to = questions.ask(self._connection, missing, asked)
            for place, part in questions.answers(self._connection, reply_to, set(missing), seconds, for_each=for_each):
                if part is None:
                    missing.discard(place)
                    continue
                take(place, part)
                for name in _list(part, "damaged"):
                    self._unseen.damaged.append(f"{self._places[place]}: {printable(str(name)[:500])}")
        except (RedisError, OSError) as error:
            self._unseen.no_ledger = str(error)
        for place in missing:
            self._unseen.silent.append(self._places.pop(place))


def _texts(part: Any, name: str) -> list[str]:
    return [one for one in _list(part, name) if isinstance(one, str)]


def _list(part: Any, name: str) -> list[Any]:
    found = part.get(name) if isinstance(part, dict) else None
    return found if isinstance(found, list) else []


# The host that is asked ------------------------------------------------------------------------------------------


def keep_answering(connect: Callable[[], Redis], folder: Path, place: str, stop: StopEvent) -> None:
    """Answer what other hosts ask, until the event is set."""
    trouble = Repeated("trace: questions of other hosts", logger.warning, logger.info)
    pauses = Backoff(0.1, 5.0)
    with connect() as client, stop.calling((waiting := Blocking(client)).end):
        while not stop.is_set():
            try:
                question = questions.next_question(waiting, place, _LISTEN_SECONDS)
                if question is not None:
                    questions.answer(client, question, place, _answer(question.asked, folder))
            except (RedisError, OSError) as error:
                trouble.came(str(error))
                stop.wait(pauses.next())
            else:
                trouble.is_over()
                pauses.reset()


def _answer(asked: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    unseen = Unseen()
    try:
        found: Iterable[MessageLife]
        if "recipients" in asked:
            yield from _recipients(folder, moment(number(asked["recipients"])), unseen)
        elif "ids" in asked:
            ids = asked["ids"]
            found = lives(ids, folder, unseen=unseen) if are_ids(ids) and len(ids) <= _MOST_LIMIT else ()
            yield from _parts(found)
        else:
            yield from _parts(find(_query(asked), folder, unseen=unseen))
    except (ValueError, TypeError, KeyError):  # who asks is of another version
        return
    if unseen.damaged:
        yield {"damaged": unseen.damaged}


def _recipients(folder: Path, since: float, unseen: Unseen) -> Iterator[dict[str, Any]]:
    """Yield the recipients that this host remembers since then, a part for every so many events that it reads."""
    found = SeenRecipients()
    told = {"accepted": 0, "refused": 0}

    def part() -> dict[str, Any]:
        fresh = {name: list(islice(getattr(found, name), count, None)) for name, count in told.items()}
        told.update({name: count + len(fresh[name]) for name, count in told.items()})
        return fresh

    with Reader(folder, unseen) as reader:
        for number, event in enumerate(reader.received(since), 1):
            found.take(event)
            if not number % _READ_AT_ONCE:
                yield part()
    yield {**part(), "done": True, "hashed": found.hashed, "cut": found.is_cut}


def _query(asked: dict[str, Any]) -> Query:
    terms = []
    for role, kinds, value in asked["find"]:
        if role not in _ROLES or any(kind not in "imftFTq" for kind in any_text(kinds)):
            raise ValueError("no term")
        terms.append(Term(role, kinds, any_text(value)))
    status = asked["status"]
    until = asked["until"]
    return Query(
        tuple(terms),
        moment(number(asked["since"])),
        math.inf if until is None else moment(number(until)),
        status if status in STATUSES else None,
        max(1, min(int(number(asked["limit"])), _MOST_LIMIT)),
    )


def _parts(found: Iterable[MessageLife]) -> Iterator[dict[str, Any]]:
    part: list[Any] = []
    octets = 0
    for life in found:
        for event in life.events:
            wire = events.stored(event)
            part.append(wire)
            octets += len(json.dumps(wire))
        if octets > _PART:
            yield {"events": part}
            part, octets = [], 0
    if part:
        yield {"events": part}
