"""Look-up: finds the lives of messages in the files of this host, on other hosts, and in the ledger.

``find`` blocks: call it in a thread. It yields what it has found, the newest first, as soon as it knows it. A file that
cannot be read and a host that does not answer are named in the Unseen; the others are answered. Nothing is raised but
by the caller's own connection: a Redis that is away is in the Unseen, too.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from redis.exceptions import RedisError

from relay.batches import batched
from relay.ledger import whereabouts
from relay.mail.ids import made_at
from relay.trace import events, files, privacy, search_terms
from relay.trace.events import Event
from relay.trace.files import HOUR, HourFile, OpenFile
from relay.trace.life import MessageLife, assemble
from relay.trace.privacy import Privacy
from relay.trace.search_terms import Term

T = TypeVar("T")
_PAGE = 200  # messages that are put together at once
_SLACK = 86400.0  # seconds by which the clock of an id may differ from the file's: ids never go back with it
_BY_STATUS = {"failed": (events.FAILED,), "refused": (events.REFUSED,), "lost": ("lost",)}


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for: words of one role are alternatives, of different roles all must be true.

    ``since`` and ``until`` are seconds since the epoch; ``status`` is one of ``relay.trace.life.STATUSES``, or None.
    """

    terms: tuple[Term, ...] = ()
    since: float = 0.0
    until: float = math.inf
    status: str | None = None
    limit: int = 50

    @classmethod
    def of(cls, what: Iterable[str], **rest: Any) -> Query:
        """Make a query of what an operator types. Raises relay.trace.search_terms.NoWord."""
        return cls(tuple(map(search_terms.read, what)), **rest)


@dataclass(slots=True)
class Unseen:
    """What a look-up could not see: files that cannot be read, hosts that did not answer, and why not the ledger.

    ``files`` is how many were looked through, ``oldest`` when the first of them begins (None: there is none).
    """

    damaged: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    no_ledger: str = ""
    files: int = 0
    oldest: float | None = None


class Others(Protocol):
    """The other hosts, see remote_lookup.py; both return what was found by those that answered, with all its events."""

    def matching(self, query: Query) -> Mapping[str, list[Event]]: ...
    def of(self, ids: Sequence[str]) -> Mapping[str, list[Event]]: ...


Progress = Callable[[int, int], object]  # how many octets of how many have been looked through


def find(
    query: Query,
    folder: Path,
    *,
    connection: Any = None,
    others: Others | None = None,
    unseen: Unseen | None = None,
    progress: Progress | None = None,
) -> Iterator[MessageLife]:
    """Yield the messages that a query is about, the newest first, at most ``query.limit``.

    ``folder`` is ``files.folder_of(settings.state_dir)``. With ``connection``, a blocking Redis client, where each copy
    stands is asked from the ledger; with ``others`` what other hosts know is there, too. ``unseen`` is filled.
    """
    with Reader(folder, unseen or Unseen(), connection, others or None) as reader:
        if not others:
            yield from islice(reader.meant(query, progress), query.limit)
            return
        known = others.matching(query)
        local = list(islice(reader.meant(query, progress), query.limit))
        seen = {life.id for life in local}
        events_here = reader.events_of([message_id for message_id in known if message_id not in seen])
        whole = reader.lives({message_id: [*some, *known[message_id]] for message_id, some in events_here.items()})
        found = sorted([*local, *_meant(whole, query, reader.privacy)], key=lambda life: -life.at)
        yield from islice(found, query.limit)


def lives(
    ids: Sequence[str],
    folder: Path,
    *,
    connection: Any = None,
    others: Others | None = None,
    unseen: Unseen | None = None,
) -> list[MessageLife]:
    """Return the lives of messages by their ids, as far as they are known; in no order."""
    with Reader(folder, unseen or Unseen(), connection, others or None) as reader:
        return reader.lives(reader.events_of(ids))


def _meant(found: Iterable[MessageLife], query: Query, kept: Privacy | None) -> Iterator[MessageLife]:
    """Yield those that the query means: a life of which nothing is known is none."""
    for life in found:
        is_within = query.since <= life.at <= query.until and query.status in {None, life.status}
        if life.events and is_within and matches(life.words, query, kept):
            yield life


def matches(found: frozenset[str], query: Query, kept: Privacy | None) -> bool:
    """Say whether a message with these words is one that the query names."""
    return all(group & found for group in groups_of(query, kept).values())


def groups_of(query: Query, kept: Privacy | None) -> dict[str, frozenset[str]]:
    """Return the words of each role."""
    groups: dict[str, frozenset[str]] = {}
    for term in query.terms:
        found = term.words(kept.pseudonym if kept else None)
        groups[term.role] = groups.get(term.role, frozenset()) | found
    return groups


class Reader:
    """One look-up: the files of this host, opened as they are needed and kept open, other hosts, and the ledger."""

    def __init__(self, folder: Path, unseen: Unseen, connection: Any = None, others: Others | None = None) -> None:
        self._folder = folder
        self._unseen = unseen
        self._connection = connection
        self._others = others
        self._ends = ExitStack()
        self._open: dict[Path, OpenFile | None] = {}
        self._files: list[HourFile] = []
        self._found_in: dict[str, int] = {}  # message id -> the hour of the file in which it was found
        self.privacy: Privacy | None = None

    def __enter__(self) -> Self:
        try:
            self._files = files.listed(self._folder)[::-1]
            if key := privacy.key_of(self._folder):
                self.privacy = Privacy(privacy.HASHED, key)
        except OSError as error:
            self._unseen.damaged.append(f"{error.filename or self._folder}: {error.strerror or error}")
        self._unseen.files = len(self._files)
        self._unseen.oldest = float(self._files[-1].hour) if self._files else None
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def meant(self, query: Query, progress: Progress | None) -> Iterator[MessageLife]:
        """Yield what is meant and known here, completed by what other hosts know of it."""
        for page in self._pages(query, progress):
            yield from sorted(_meant(self.lives(page), query, self.privacy), key=lambda life: -life.at)

    def lives(self, found: dict[str, list[Event]]) -> list[MessageLife]:
        """Return the lives of these messages: to what is found comes what other hosts and the ledger know of them."""
        if self._others and found:
            for message_id, some in self._others.of(list(found)).items():
                found.setdefault(message_id, []).extend(some)
        now = None
        if self._connection is not None:
            try:
                now = whereabouts.find(self._connection, {life.id: life.destinations for life in assemble(found)})
            except (RedisError, OSError) as error:
                self._unseen.no_ledger = str(error)
        return assemble(found, now)

    def _pages(self, query: Query, progress: Progress | None) -> Iterator[dict[str, list[Event]]]:
        """Yield what this host's files have of messages that may be meant, in pages."""
        seen: set[str] = set()
        page: list[str] = []
        size = max(10, min(_PAGE, query.limit))
        for message_id in self._candidates(query, progress):
            if message_id not in seen:
                seen.add(message_id)
                page.append(message_id)
                if len(page) >= size:
                    yield self.events_of(page)
                    page, size = [], _PAGE
        if page:
            yield self.events_of(page)

    def _candidates(self, query: Query, progress: Progress | None) -> Iterator[str]:
        """Yield the ids of messages that may be meant, the newest first, some more than once."""
        wanted = self._wanted(query)
        chosen = [file for file in self._files if query.since - HOUR < file.hour + HOUR and file.hour <= query.until]
        total, done = sum(file.octets for file in chosen) if progress else 0, 0
        for file in chosen:
            numbers: list[int] = self._asked(file, lambda opened: opened.rows_of(wanted))
            for some in batched(numbers, _PAGE):
                for message_id in self._asked(file, partial(_ids, numbers=some)):
                    self._found_in[message_id] = min(file.hour, self._found_in.get(message_id, file.hour))
                    yield message_id
            if progress:
                done += file.octets
                progress(done, total)

    def _wanted(self, query: Query) -> list[frozenset[str]]:
        """Return by which words to look, one of each group in the same row; what is found is compared with the rest."""
        groups = groups_of(query, self.privacy)
        if "id" in groups:
            return [groups["id"]]
        rare = frozenset(search_terms.STATUS + word for word in _BY_STATUS.get(query.status or "", ()))
        # What was received has sender and recipients in its row, and that it was refused; what a backup did is another.
        # With other hosts, one of them may have the other half of a message.
        if rare and (not groups or (self._others is None and query.status != "refused")):
            return [rare]
        if query.status != "refused":
            return list(groups.values())
        return [*groups.values(), rare]

    def events_of(self, ids: Sequence[str]) -> dict[str, list[Event]]:
        """Return the events of these messages."""
        found: dict[str, list[Event]] = {message_id: [] for message_id in ids}
        if not ids:
            return found
        begin = min(min(made_at(message_id) - _SLACK, self._found_in.get(message_id, math.inf)) for message_id in ids)
        group = [search_terms.ID + message_id for message_id in ids]

        def read(opened: OpenFile) -> list[Event]:
            rows = opened.read(opened.rows_of([group]))
            return [event for row in rows for event in map(events.read, row) if event is not None and event.id in found]

        for file in reversed(self._files):
            if file.hour + HOUR + HOUR > begin:
                for event in self._asked(file, read):
                    found[event.id].append(event)
        return found

    def received(self, since: float, progress: Progress | None = None) -> Iterator[Event]:
        """Yield who every message was for that was received since then, the newest first."""
        chosen = [file for file in self._files if since < file.hour + HOUR]
        total, done = sum(file.octets for file in chosen), 0
        for file in chosen:
            numbers: list[int] = self._asked(file, lambda opened: opened.rows_of([]))
            for start in range(0, len(numbers), _PAGE):
                for event in self._asked(file, partial(_received, numbers=numbers[start : start + _PAGE])):
                    if event.at >= since:
                        yield event
            done += file.octets
            if progress:
                progress(done, total)

    def _asked(self, file: HourFile, ask: Callable[[OpenFile], list[T]]) -> list[T]:
        """Ask a file; one that cannot be read is told of once, and set aside if it is damaged and nobody writes it."""
        try:
            if file.path not in self._open:
                opened = files.open_to_read(file)
                self._ends.callback(opened.close)
                self._open[file.path] = opened
            found = self._open[file.path]
            return [] if found is None else ask(found)
        except (OSError, sqlite3.Error, files.ClosedFile, files.DamagedFile) as error:
            self._open[file.path] = None
            if not file.path.exists():
                return []  # the oldest goes while we look
            text = str(error)
            if files.is_damage(error) and file.hour + 2 * HOUR < time.time():
                with suppress(OSError):
                    text += f"; it is kept as {file.set_aside()}"
            self._unseen.damaged.append(f"{file.path.name}: {text}")
            return []


def _received(opened: OpenFile, numbers: Sequence[int]) -> list[Event]:
    """Return the events of these rows that say who a message is for, the other way round than they were written."""
    return [
        event
        for row in opened.read(numbers)
        for one in reversed(row)
        if isinstance(one, list) and one[:1] in ([events.RECEIVED], [events.MORE])
        if (event := events.read(one)) is not None
    ]


def _ids(opened: OpenFile, numbers: Sequence[int]) -> list[str]:
    """Return the ids of messages in these rows."""
    found = (events.read(one) for row in opened.read(numbers) for one in row)
    return list(dict.fromkeys(event.id for event in found if event is not None))
