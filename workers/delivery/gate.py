"""Whether a courier may start another copy: its breaker, its outbox and a drain, asked in one place."""

from __future__ import annotations

from workers.delivery.outbox import Outbox
from workers.delivery.retry import Breaker


class Gate:
    """The gate of one courier; ``is_draining`` is set once, at the stop signal."""

    def __init__(self, breaker: Breaker, outbox: Outbox) -> None:
        self._breaker = breaker
        self._outbox = outbox
        self.is_draining = False

    @property
    def is_closed(self) -> bool:
        """Whether no copy may be started, but for a probe."""
        return self._breaker.is_open or self._breaker.is_in_doubt or self._outbox.is_late or self.is_draining

    @property
    def is_before_probe(self) -> bool:
        """Whether the server is away and its next probe not yet due."""
        return self._breaker.is_open and self._breaker.seconds_to_probe > 0

    @property
    def is_probe_due(self) -> bool:
        """Whether a copy may be started as a probe of the server."""
        breaker = self._breaker
        is_due = breaker.is_in_doubt or (breaker.is_open and breaker.seconds_to_probe == 0)
        return is_due and not self._outbox.is_late

    @property
    def accepts_jobs(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return not (self.is_before_probe or self._outbox.is_late or self.is_draining)
