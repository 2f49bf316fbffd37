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
    unseen = Unseen() if unseen is None else unseen
    with Reader(folder, unseen) as reader:
        if not others:
            found = _local(reader, query, connection, None, unseen, progress)
            yield from islice(found, query.limit)
            return
        known = others.matching(query)
        local = list(islice(_local(reader, query, connection, others, unseen, progress), query.limit))
        seen = {life.id for life in local}
        events_here = reader.events_of([message_id for message_id in known if message_id not in seen])
        abroad = {message_id: [*some, *known[message_id]] for message_id, some in events_here.items()}
        whole = _lives(abroad, connection, others, unseen)
        yield from islice(
            sorted([*local, *_meant(whole, query, reader.privacy)], key=lambda life: -life.at), query.limit
        )


def _local(
    reader: Reader,
    query: Query,
    connection: Any,
    others: Others | None,
    unseen: Unseen,
    progress: Progress | None,
) -> Iterator[MessageLife]:
    """Yield what is meant and known here, completed by what other hosts know of it."""
    for page in _pages(reader, query, progress, is_alone=others is None):
        found = _lives(page, connection, others, unseen)
        yield from sorted(_meant(found, query, reader.privacy), key=lambda life: -life.at)


def _lives(found: dict[str, list[Event]], connection: Any, others: Others | None, unseen: Unseen) -> list[MessageLife]:
    if others and found:
        for message_id, some in others.of(list(found)).items():
            found.setdefault(message_id, []).extend(some)
    return assemble(found, _now(connection, found, unseen))


def lives(
    ids: Sequence[str],
    folder: Path,
    *,
    connection: Any = None,
    others: Others | None = None,
    unseen: Unseen | None = None,
) -> list[MessageLife]:
    """Return the lives of messages by their ids, as far as they are known; in no order."""
    unseen = Unseen() if unseen is None else unseen
    with Reader(folder, unseen) as reader:
        return _lives(reader.events_of(ids), connection, others, unseen)


def _now(
    connection: Any, found: Mapping[str, Iterable[Event]], unseen: Unseen
) -> Mapping[str, whereabouts.MessageWhereabouts] | None:
    if connection is None:
        return None
    try:
        return whereabouts.find(connection, {life.id: life.destinations for life in assemble(found)})
    except (RedisError, OSError) as error:
        unseen.no_ledger = str(error)
        return None


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


def _pages(
    reader: Reader, query: Query, progress: Progress | None, *, is_alone: bool
) -> Iterator[dict[str, list[Event]]]:
    """Yield what this host's files have of messages that may be meant, in pages."""
    seen: set[str] = set()
    page: list[str] = []
    size = max(10, min(_PAGE, query.limit))
    for message_id in reader.candidates(query, progress, is_alone=is_alone):
        if message_id not in seen:
            seen.add(message_id)
            page.append(message_id)
            if len(page) >= size:
                yield reader.events_of(page)
                page, size = [], _PAGE
    if page:
        yield reader.events_of(page)


class Reader:
    """The files of this host, opened as they are needed and kept open for one look-up."""

    def __init__(self, folder: Path, unseen: Unseen) -> None:
        self._folder = folder
        self._unseen = unseen
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

    def candidates(self, query: Query, progress: Progress | None = None, *, is_alone: bool = True) -> Iterator[str]:
        """Yield the ids of messages that may be meant, the newest first, some more than once.

        Unless it ``is_alone``, another host may have the other half of a message.
        """
        wanted = self._wanted(query, is_alone=is_alone)
        chosen = [file for file in self._files if query.since - HOUR < file.hour + HOUR and file.hour <= query.until]
        total, done = sum(file.octets for file in chosen) if progress else 0, 0
        for file in chosen:
            numbers: list[int] = self._asked(file, lambda opened: opened.rows_of(wanted))
            for start in range(0, len(numbers), _PAGE):
                for message_id in self._asked(file, partial(_ids, numbers=numbers[start : start + _PAGE])):
                    self._found_in[message_id] = min(file.hour, self._found_in.get(message_id, file.hour))
                    yield message_id
            if progress:
                done += file.octets
                progress(done, total)

    def _wanted(self, query: Query, *, is_alone: bool) -> list[frozenset[str]]:
        """Return by which words to look, one of each group in the same row; what is found is compared with the rest."""
        groups = groups_of(query, self.privacy)
        if "id" in groups:
            return [groups["id"]]
        rare = frozenset(search_terms.STATUS + word for word in _BY_STATUS.get(query.status or "", ()))
        # What was received has sender and recipients in its row, and that it was refused; what a backup did is another.
        if rare and (not groups or (is_alone and query.status != "refused")):
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


def _ids(opened: OpenFile, numbers: Sequence[int]) -> list[str]:
    """Return the ids of messages in these rows."""
    found = (events.read(one) for row in opened.read(numbers) for one in row)
    return list(dict.fromkeys(event.id for event in found if event is not None))
