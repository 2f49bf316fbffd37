"""Whether a courier may start another copy: its breaker, its outbox, hold, throttle and a drain, in one place."""

from __future__ import annotations

from relay.breaker import Breaker
from workers.delivery.hold_and_throttle import HoldAndThrottle
from workers.delivery.outbox import Outbox


class Gate:
    """The gate of one courier; ``is_draining`` is set once, at the stop signal."""

    def __init__(self, breaker: Breaker, outbox: Outbox, hold_and_throttle: HoldAndThrottle) -> None:
        self._breaker = breaker
        self._outbox = outbox
        self._hold_and_throttle = hold_and_throttle
        self.is_draining = False

    @property
    def is_closed(self) -> bool:
        """Whether no copy may be started, but for a probe."""
        return (
            not self._breaker.is_clear
            or self._outbox.is_late
            or self.is_draining
            or not self._hold_and_throttle.lets_begin
        )

    @property
    def gives_back(self) -> bool:
        """Whether no copy is to be kept in hand: nobody knows for how long none may be started."""
        return self._hold_and_throttle.is_barred or (self._breaker.is_open and self._breaker.seconds_to_probe > 0)

    @property
    def is_probe_due(self) -> bool:
        """Whether a copy may be started as a probe of the server."""
        breaker = self._breaker
        is_due = breaker.is_in_doubt or (breaker.is_open and breaker.seconds_to_probe == 0)
        return is_due and not (self._outbox.is_late or self._hold_and_throttle.is_barred)

    @property
    def is_bare_probe_due(self) -> bool:
        """Whether a held server that is away is to be probed: without a copy, so not one that refuses them all."""
        breaker = self._breaker
        is_due = breaker.is_open and not breaker.is_refusing and breaker.seconds_to_probe == 0
        return is_due and self._hold_and_throttle.is_held and not self.is_draining

    @property
    def accepts_jobs(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return not (self.gives_back or self._outbox.is_late or self.is_draining)

    def begins(self) -> None:
        """Note that a copy is started."""
        self._hold_and_throttle.begins()
