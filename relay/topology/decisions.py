"""Deciding who is the primary: an intent that has an end, then a decision that was never there in part.

An intent ends by itself, by Redis's clock. A decision is one MULTI, with its record in the audit, and only goes through
while nobody else has decided, or ended the intent, meanwhile: two operators never both succeed unseen. Raises
RedisError throughout; after a commit that got no answer it is not known whether it was done.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError, WatchError

from relay.ledger import audit, changes, keys
from relay.ledger.audit import Act
from relay.topology import heartbeats
from relay.topology.heartbeats import Heartbeat
from relay.topology.moved import MapState
from relay.topology.state import Decision, Intent, Topology, read_or_why


class Overtaken(Exception):
    """Somebody else was quicker; the text says who, and when."""


@dataclass(frozen=True, slots=True)
class View:
    """What stands in Redis: the decision that holds, what is being prepared, and the relay processes.

    ``nonsense`` says why what stands there as topology is none. ``moves`` is the state of the map of who has moved.
    """

    topology: Topology | None
    intent: Intent | None
    beats: tuple[Heartbeat, ...]
    now: float
    nonsense: str = ""
    moves: MapState | None = None
    nonsense_of_moves: str = ""

    @property
    def epoch(self) -> int:
        return self.topology.epoch if self.topology else 0

    @property
    def highest(self) -> int:
        """The highest epoch that anybody has seen: Redis may have been given older data back."""
        return max([self.epoch, *(beat.epoch for beat in self.beats)])

    @property
    def living(self) -> list[Heartbeat]:
        return heartbeats.living(self.beats)

    @property
    def dead(self) -> list[Heartbeat]:
        return [beat for beat in self.beats if not beat.is_alive]

    @property
    def moved(self) -> int:
        """The number of entries in the map of who has moved."""
        return self.moves.count if self.moves else 0

    def goes_by_moves(self, beat: Heartbeat) -> bool:
        """Say whether a process goes by who has moved as it stands in Redis."""
        has_trouble = bool(beat.moved_trouble) and not beat.is_unsaved
        return not has_trouble and (beat.moved or 0) == (self.moves.generation if self.moves else 0)

    def follows(self, beat: Heartbeat) -> bool:
        """Say whether a process does what was decided."""
        if self.topology is None:
            return not beat.epoch
        decided = self.topology
        return (beat.epoch, beat.primary) == (decided.epoch, decided.primary) and beat.goes_by(decided.now.routes)


def view(connection: Redis) -> View:
    """Return what stands in Redis now."""
    with connection.pipeline(transaction=True) as pipe:
        pipe.get(keys.TOPOLOGY)
        pipe.get(keys.INTENT)
        pipe.get(keys.MOVES_STATE)
        decided, intent, moves = pipe.execute(raise_on_error=False)
    found, nonsense = read_or_why(decided, Topology.from_json)
    beats, now = tuple(heartbeats.read(connection)), changes.now(connection)
    return View(found, _intent(intent), beats, now, nonsense, *MapState.read(moves))


def topology(connection: Redis) -> tuple[Topology | None, str]:
    """Return the decision that holds, or why what stands there is none."""
    return read_or_why(get(connection, keys.TOPOLOGY), Topology.from_json)


def propose(
    connection: Redis,
    epoch: int,
    primary: str,
    old: str,
    seconds: float,
    *,
    route: str = "",
    servers: tuple[str, ...] = (),
) -> Intent:
    """Ask every relay process to prepare. Raises Overtaken where somebody else has asked."""
    who, at = audit.operator(), changes.now(connection)
    intent = Intent(secrets.token_hex(8), epoch, primary, old, who, at, seconds, route, servers)
    if connection.set(keys.INTENT, intent.to_json(), nx=True, px=max(1, math.ceil(seconds * 1000))):
        return intent
    other = view(connection).intent
    if other is None:
        raise Overtaken(
            "somebody else has just begun or ended a promotion: look at `smtp-dup topology`, then try again"
        )
    ago = max(0.0, changes.now(connection) - other.at)
    raise Overtaken(
        f"{other.by} has been preparing {other.primary} for {ago:.0f} s: wait, or end that with `promote --cancel`"
    )


def withdraw(connection: Redis, intent: Intent | None = None) -> Intent | None:
    """End an intent: that one if it still stands, or whichever there is. Returns what was ended."""
    while True:
        try:
            with connection.pipeline(transaction=True) as pipe:
                pipe.watch(keys.INTENT)
                text = get(pipe, keys.INTENT)
                found = _intent(text)
                if text is None or (intent is not None and (found is None or found.id != intent.id)):
                    return None
                pipe.multi()
                pipe.delete(keys.INTENT)
                pipe.execute()
                return found or intent
        except WatchError:
            continue


def commit(
    connection: Redis, seen: View, decision: Decision, former: Decision, act: Act, intent: Intent | None = None
) -> Topology:
    """Decide, in place of what was ``seen``, with its record in the audit. With an intent only while that stands.

    ``former`` is what an undo goes back to. Raises Overtaken, and then nothing has changed.
    """
    with connection.pipeline(transaction=True) as pipe:
        try:
            pipe.watch(keys.TOPOLOGY, keys.INTENT)
            current, _ = read_or_why(get(pipe, keys.TOPOLOGY), Topology.from_json)
            asked = _intent(get(pipe, keys.INTENT))
            if current != seen.topology:
                raise Overtaken(_said(current, changes.now(connection)))
            if intent is not None and (asked is None or asked.id != intent.id):
                raise Overtaken("the preparation has ended meanwhile: cancelled, or its time was over")
            decided = Topology(replace(decision, at=changes.now(connection)), former)
            pipe.multi()
            pipe.set(keys.TOPOLOGY, decided.to_json())
            pipe.delete(keys.INTENT)
            audit.add(pipe, act)
            pipe.execute()
        except WatchError:
            raise Overtaken(_said(view(connection).topology, changes.now(connection))) from None
    return decided


def _said(found: Topology | None, now: float) -> str:
    if found is None:
        return "somebody else has changed the topology at the same moment: look at `smtp-dup topology`"
    ago = max(0.0, now - found.now.at)
    return f"{found.now.by or 'somebody'} {found.in_words()} {ago:.0f} s before you"


def get(pipe: Any, key: str) -> Any:
    """Read a key; an error stands for another type of key."""
    try:
        return pipe.get(key)
    except ResponseError as error:
        return error


def _intent(data: Any) -> Intent | None:
    return read_or_why(data, Intent.from_json)[0]
