"""Who follows a decision or a move: every process that lives, or lived when it was made.

Of a decision nobody follows it any more after a later one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from relay.mail.text import count
from relay.topology import decisions, heartbeats
from relay.topology.heartbeats import Heartbeat
from relay.topology.promotion import Plan
from relay.topology.state import Topology

_EVERY = 0.1  # seconds between two looks at the processes


@dataclass(frozen=True, slots=True)
class Followed:
    """What has become of it: who follows, who lived when it was made and does not, who was dead before."""

    followed: list[Heartbeat]
    late: list[Heartbeat]
    dead: list[Heartbeat]
    overtaken: Topology | None = None  # by what somebody has decided since

    @classmethod
    def of(
        cls,
        beats: Iterable[Heartbeat],
        follows: Callable[[Heartbeat], bool],
        lived: Iterable[Heartbeat],
        overtaken: Topology | None = None,
    ) -> Followed:
        """Divide processes by whether each follows; those that ``lived`` are late where they are silent now."""
        awaited = {beat.process for beat in lived}
        found = cls([], [], [], overtaken=overtaken)
        for beat in beats:
            is_late = beat.is_alive or beat.process in awaited
            (found.followed if follows(beat) else found.late if is_late else found.dead).append(beat)
        return found

    @property
    def finishing(self) -> int:
        """Transactions that go on with the former primary."""
        return sum(beat.in_old for beat in self.followed if beat.is_alive)

    def as_object(self) -> dict[str, Any]:
        """Return who follows for a program."""
        sides = (("followed", self.followed), ("late", self.late), ("dead", self.dead))
        return {name: [beat.label for beat in beats] for name, beats in sides}

    @property
    def in_words(self) -> str:
        asked = len(self.followed) + len(self.late)
        return f"{len(self.followed)} of {count(asked, 'process follows', 'processes follow')}"

    @property
    def is_whole(self) -> bool:
        return not self.late and not self.finishing

    @property
    def is_well(self) -> bool:
        """Whether what was decided holds, and everybody who lives goes by it."""
        return not self.late and self.overtaken is None


def follow(connection: Redis, made: Plan, seconds: float, report: Callable[[str], None]) -> Followed:
    """Wait until everybody follows and nothing goes on with the former primary, at most so long.

    Ends where somebody has decided otherwise since: who goes by that follows this no more. Raises RedisError.
    """
    deadline = time.monotonic() + seconds
    while True:
        seen = decisions.view(connection)
        later = seen.topology if seen.epoch > made.epoch else None
        found = Followed.of(seen.beats, made.is_followed_by, made.seen.living, later)
        finishing = found.finishing
        report(found.in_words + (f", {finishing} transactions go on with {made.old}" if finishing else ""))
        if later or found.is_whole or time.monotonic() >= deadline:
            return found
        time.sleep(_EVERY)


def follow_moves(
    connection: Redis, generation: int, lived: Sequence[Heartbeat], seconds: float, report: Callable[[str], None]
) -> Followed:
    """Wait until every process that lives, or ``lived``, goes by a generation of who has moved, at most so long."""
    deadline = time.monotonic() + seconds
    while True:
        beats = heartbeats.read(connection)
        found = Followed.of(beats, lambda beat: beat.is_alive and (beat.moved or 0) >= generation, lived)
        report(found.in_words)
        if not found.late or time.monotonic() >= deadline:
            return found
        time.sleep(_EVERY)
