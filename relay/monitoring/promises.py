"""What keeps Redis from keeping what it acknowledges: told in the log when it begins, and when it is over.

An administrator may change a setting of Redis while mail goes on: `appendonly no`, an eviction policy, a disk that
takes no log any more. A Redis that is away is told of by those who need it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from threading import Event

from relay import maillog
from relay.config.model import Settings
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.probes import probe_redis

_EVERY = 60.0  # seconds


def tell(finding: ProbeResult) -> None:
    """Log one that is not kept."""
    text = "a copy may be lost" if finding.subject.startswith("redis") else "a failover may not work"
    maillog.notice("warning", text, about=finding.subject, finding=finding.text)


class Promises:
    """Those that are broken, as told last."""

    def __init__(self) -> None:
        self._broken: frozenset[str] = frozenset()

    def hear(self, found: Sequence[ProbeResult]) -> None:
        """Tell of what is new in this look."""
        if len(found) < 2:
            return  # Redis does not answer: nothing is known
        broken = {finding.subject: finding for finding in found if not finding.ok}
        for subject, finding in broken.items():
            if subject not in self._broken:
                tell(finding)
        for subject in sorted(self._broken - broken.keys()):
            maillog.notice("info", "Redis keeps this promise again", about=subject)
        self._broken = frozenset(broken)


def keep_looking(settings: Settings, url: str, stop: Event, every: float = _EVERY) -> None:
    """Look from time to time until the stop; not all hosts at the same time."""
    promises = Promises()
    while not stop.wait(every * random.uniform(0.5, 1.0)):
        promises.hear(asyncio.run(probe_redis(settings, url)))
