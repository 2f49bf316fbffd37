"""Who follows a decision: every process that lives, or lived when it was made, or nobody any more for a later one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from redis import Redis

from relay.topology import decisions
from relay.topology.heartbeats import Heartbeat
from relay.topology.promotion import Plan
from relay.topology.state import Topology

_EVERY = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True, slots=True)
class Followed:
    """What has become of a decision: who follows it, who lived when it was made and does not, who was dead before."""

    followed: list[Heartbeat]
    late: list[Heartbeat]
    dead: list[Heartbeat]
    finishing: int  # transactions that go on with the former primary
    overtaken: Topology | None = None  # by what somebody has decided since

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
    lived = {beat.process for beat in made.seen.living}
    while True:
        seen = decisions.view(connection)
        followed = [beat for beat in seen.beats if made.is_followed_by(beat)]
        behind = [beat for beat in seen.beats if beat not in followed]
        late = [beat for beat in behind if beat.is_alive or beat.process in lived]
        dead = [beat for beat in behind if beat not in late]
        later = seen.topology if seen.epoch > made.epoch else None
        found = Followed(followed, late, dead, sum(beat.in_old for beat in followed if beat.is_alive), later)
        report(
            f"{len(followed)} of {len(followed) + len(late)} processes follow"
            + (f", {found.finishing} transactions go on with {made.old}" if found.finishing else "")
        )
        if found.is_whole or later or time.monotonic() >= deadline:
            return found
        time.sleep(_EVERY)
