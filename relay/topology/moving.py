"""Moving mailboxes in Redis: a batch is one generation, that is there whole or not at all.

A generation is one MULTI: the entries, the state, what it changed, and its record in the audit; it only goes through
while nobody else has made one meanwhile. Whoever goes by the map keeps a copy of it (relay.routing.moved_copy), so what
Redis has lost is put back from there: until then nothing is moved. Raises RedisError throughout; after a commit that
got no answer it is not known whether it was done.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

from redis import Redis
from redis.exceptions import ResponseError, WatchError

from relay.batches import batched
from relay.ledger import audit, changes, keys
from relay.ledger.audit import Act
from relay.mail.text import count, printable
from relay.topology import decisions
from relay.topology.heartbeats import Heartbeat
from relay.topology.moved import Changes, MapState, MapStep, MovedEntry, is_key
from relay.topology.state import Unreadable

_AT_ONCE = 2000  # entries in a command
_LOGGED = 100  # generations
_LONGEST_STEP = 20_000  # entries of one that is logged: beyond that reading the whole map is no more work
_AGAIN = 20  # times that somebody else may be quicker
_NOTHING = MapState()

Page = tuple[dict[str, MovedEntry], dict[str, str]]  # entries by key, and why others make no sense


class Lost(Exception):
    """Redis does not have the map as it was; the text says what it has."""


class NotFollowed(Exception):
    """Somebody has made another generation, which is not followed by everybody yet."""


class Forked(Exception):
    """What Redis has does not follow from the generation that is held."""


def state(connection: Any) -> tuple[MapState | None, str]:
    """Return the state of the map, None before the first move, or why what stands there is none."""
    return MapState.read(decisions.get(connection, keys.MOVES_STATE))


def objection(held: MapState, found: MapState | None, nonsense: str) -> str:
    """Say why who goes by a generation does not follow what stands in Redis; "" where that is the same, or newer."""
    kept = f"it keeps generation {held.generation} of who has moved"
    repair = "`smtp-dup move --repair` puts it back"
    if nonsense:
        return f"{kept}: what Redis holds as its state makes no sense: {nonsense}; {repair}"
    if (held.generation, held.id) == (_NOTHING.generation, _NOTHING.id):
        return ""
    if found is None:
        return f"{kept}: Redis has lost it; {repair}"
    if (found.generation, found.id) == (held.generation, held.id) or held.generation < found.whole:
        return ""
    if found.generation < held.generation:
        return f"{kept}: Redis has an older one, generation {found.generation}; {repair}"
    if found.generation == held.generation or found.lineage != held.lineage:
        return f"{kept}: Redis has another one, that does not follow from it; {repair}"
    return ""


def steps(connection: Any, held: MapState, found: MapState) -> list[MapStep] | None:
    """Return what has changed since a generation, None where the whole map must be read. Raises Forked."""
    if not held.generation or held.generation < found.whole:
        return None
    if not 0 < found.generation - held.generation <= _LOGGED:  # below, each in between is looked for
        return None
    try:
        log = [MapStep.from_json(data) for data in connection.lrange(keys.MOVES_LOG, 0, _LOGGED - 1)]
    except (Unreadable, ResponseError):
        return None
    by_generation = {step.generation: step for step in log}
    same = by_generation.get(held.generation)
    after = [by_generation.get(n) for n in range(held.generation + 1, found.generation + 1)]
    if (same and same.id != held.id) or (after[0] and after[0].before != held.id):
        raise Forked
    last = held.id
    made: list[MapStep] = []
    for step in after:
        if step is None or step.before != last:
            return None
        made.append(step)
        last = step.id
    return made if last == found.id else None


def pages(connection: Any) -> Iterator[Page]:
    """Yield all entries; one that is changed meanwhile may be there as before or as after, or twice."""
    cursor = -1
    while cursor:
        cursor, page = connection.hscan(keys.MOVES, max(0, cursor), count=_AT_ONCE)
        yield _read(page.items())


def everything(connection: Any) -> Iterator[tuple[str, MovedEntry]]:
    """Yield all entries that make sense, by key; see ``pages``."""
    for found, _ in pages(connection):
        yield from found.items()


def size(connection: Any) -> int:
    """Return how many entries there are; -1 where another type of key stands there."""
    try:
        return int(connection.hlen(keys.MOVES))
    except ResponseError:
        return -1


def entries(connection: Any, wanted: Sequence[str]) -> Page:
    """Return the entries with these keys, as far as there are such."""
    found: dict[str, MovedEntry] = {}
    damaged: dict[str, str] = {}
    for some in batched(wanted, _AT_ONCE):
        names = [key.encode("utf-8", "surrogateescape") for key in some]  # an address may hold octets that are no UTF-8
        data = cast("list[bytes | None]", connection.hmget(keys.MOVES, names))
        read, wrong = _read((key, value) for key, value in zip(some, data, strict=True) if value is not None)
        found |= read
        damaged |= wrong
    return found, damaged


def _read(pairs: Iterable[tuple[bytes | str, bytes]]) -> Page:
    found: dict[str, MovedEntry] = {}
    damaged: dict[str, str] = {}
    for name, value in pairs:
        key = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        try:
            entry = MovedEntry.from_json(value)
        except Unreadable as error:
            damaged[key] = str(error)
        else:
            if is_key(key):
                found[key] = entry
            else:
                damaged[key] = "no address"
    return found, damaged


def highest(beats: Iterable[Heartbeat], held: MapState) -> int:
    """Return the highest generation that anybody who lives goes by: Redis may have been given older data back."""
    return max([held.generation, *(beat.moved or 0 for beat in beats if beat.is_alive)])


def lost(known: int, found: MapState | None, nonsense: str, size: int) -> str:
    """Say how Redis lacks the generation that relays go by; "" where it does not."""
    if nonsense:
        return f"what Redis holds as the state of who has moved makes no sense: {nonsense}"
    if (found.generation if found else 0) < known:
        older = f"generation {found.generation}" if found else "none"
        return f"relays go by generation {known} of who has moved, Redis has {older}: it was emptied or restored"
    if size != (found.count if found else 0):
        entries = count(max(0, size), "entry", "entries")
        return f"Redis holds {entries} of who has moved, and should hold {found.count if found else 0}"
    return ""


def commit(
    connection: Redis,
    wanted: Changes,
    seen: Mapping[str, MovedEntry],
    known: int,
    act: Act,
    after: int | None = None,
) -> tuple[MapState, dict[str, str]]:
    """Make these changes a generation; returns its state, and who was moved by somebody else since it was ``seen``.

    Of those it is said who has moved them where, "" where that is as it is wanted.

    Where nothing is left to change the state is the one that was there. ``known`` is the highest generation that
    anybody goes by. Raises Lost, and NotFollowed where there is a later one than ``after``, which everybody follows.
    """
    for _ in range(_AGAIN):
        with connection.pipeline(transaction=True) as pipe:
            try:
                pipe.watch(keys.MOVES_STATE, keys.MOVES)
                before = _as_known(pipe, known)
                if after is not None and before is not None and before.generation > after:
                    raise NotFollowed
                found, damaged = entries(pipe, list(wanted))
                taken = {k: _said(found.get(k), entry) for k, entry in wanted.items() if found.get(k) != seen.get(k)}
                left = {key: entry for key, entry in wanted.items() if key not in taken}
                if not left:
                    return before or _NOTHING, taken
                now = changes.now(connection)
                made = _next(before, known, now, act.who, _recounted(before, left, found, damaged))
                left = {key: entry and entry._replace(at=now) for key, entry in left.items()}
                pipe.multi()
                _write(pipe, left)
                pipe.set(keys.MOVES_STATE, made.to_json())
                _log(pipe, MapStep(made.generation, made.id, before.id if before else "", left))
                audit.add(pipe, act)
                pipe.execute()
            except WatchError:
                continue
            return made, taken
    raise Lost("others move mailboxes all the time: nothing was moved, try again")


def repair(connection: Redis, held: MapState, kept: Iterable[tuple[str, MovedEntry]], known: int, act: Act) -> MapState:
    """Put the map back as a copy has it, with what was moved since by who did not know of that.

    Raises Lost where somebody has made another generation meanwhile.
    """
    with connection.pipeline(transaction=True) as pipe:
        try:
            pipe.watch(keys.MOVES_STATE, keys.MOVES)
            before, _ = state(pipe)
            later: dict[str, MovedEntry] = {}
            if size(pipe) > 0:
                for found, _ in pages(pipe):
                    later |= {key: entry for key, entry in found.items() if entry.at > held.at}
            now = changes.now(connection)
            generation = max(known, held.generation, before.generation if before else 0) + 1
            pipe.multi()
            pipe.delete(keys.MOVES, keys.MOVES_LOG)
            names: set[str] = set()
            tally = Counter(entry.server for entry in later.values())
            rest = iter(kept)
            while some := {key: entry for key, entry in islice(rest, _AT_ONCE) if key not in later}:
                _write(pipe, some)
                names |= some.keys()
                tally.update(entry.server for entry in some.values())
            _write(pipe, later)
            count, lineage = len(names | later.keys()), held.lineage or secrets.token_hex(4)
            made = MapState(generation, secrets.token_hex(8), lineage, generation, count, now, act.who, dict(tally))
            pipe.set(keys.MOVES_STATE, made.to_json())
            audit.add(pipe, act)
            pipe.execute()
        except WatchError:
            raise Lost(
                "somebody else has changed it at the same moment: look at `smtp-dup moved`, then again"
            ) from None
    return made


def _as_known(pipe: Any, known: int) -> MapState | None:
    """Return the state that stands there, None before the first move. Raises Lost."""
    found, nonsense = state(pipe)
    if why := lost(known, found, nonsense, size(pipe)):
        raise Lost(why)
    return found


def _next(before: MapState | None, known: int, now: float, by: str, counts: tuple[int, Mapping[str, int]]) -> MapState:
    generation = max(known, before.generation if before else 0) + 1
    lineage, whole = (before.lineage, before.whole) if before else (secrets.token_hex(4), generation)
    return MapState(generation, secrets.token_hex(8), lineage, whole, counts[0], now, by, counts[1])


def _recounted(
    before: MapState | None, wanted: Changes, found: Mapping[str, MovedEntry], damaged: Mapping[str, str]
) -> tuple[int, dict[str, int]]:
    """Return how many entries there are after a change, and how many name each server."""
    count, tally = (before.count, Counter(before.servers)) if before else (0, Counter())
    for key, entry in wanted.items():
        count += (entry is not None) - (key in found or key in damaged)
        if key in found:
            tally[found[key].server] -= 1
        if entry is not None:
            tally[entry.server] += 1
    return count, dict(+tally)


def _write(pipe: Any, wanted: Changes) -> None:
    put = {key: entry.to_json() for key, entry in wanted.items() if entry is not None}
    gone = [key for key, entry in wanted.items() if entry is None]
    for some in batched(list(put), _AT_ONCE):
        pipe.hset(keys.MOVES, mapping={key: put[key] for key in some})
    for some in batched(gone, _AT_ONCE):
        pipe.hdel(keys.MOVES, *some)


def _log(pipe: Any, step: MapStep) -> None:
    if len(step.changes) > _LONGEST_STEP:
        pipe.delete(keys.MOVES_LOG)
        return
    pipe.lpush(keys.MOVES_LOG, step.to_json())
    pipe.ltrim(keys.MOVES_LOG, 0, _LOGGED - 1)


def _said(entry: MovedEntry | None, wanted: MovedEntry | None) -> str:
    if (entry and entry.server) == (wanted and wanted.server):
        return ""
    if entry is None:
        return "somebody else has moved it back meanwhile"
    return printable(f"{entry.by or 'somebody'} has moved it to {entry.server} meanwhile")
