"""The context that all command loops of one relay process share, and the set of loops that run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Protocol

from relay.config.loader import Settings
from relay.mail.ids import IdSource
from relay.smtpd.credentials import Credentials
from relay.smtpd.protocol import DeadlineWatch
from relay.smtpd.route_primaries import RoutePrimaries
from relay.smtpd.shared_counters import ProcessCounters
from relay.smtpd.snapshot import Snapshot
from relay.smtpd.staging import Staging


class Stoppable(Protocol):
    """A command loop, as the relay process sees it when it stops."""

    def stop(self, *, impatient: bool) -> None:
        """End an idle session now, and one in a transaction after it; if ``impatient``, before its DATA."""


@dataclass(slots=True)
class Context:
    """What the command loops of one relay process share."""

    settings: Settings
    snapshot: Snapshot  # of the roles, for the next transaction
    staging: Staging
    ids: IdSource
    counters: ProcessCounters
    credentials: Credentials = field(default_factory=Credentials)
    command_loops: set[Stoppable] = field(default_factory=set)
    watch: DeadlineWatch = field(default_factory=DeadlineWatch)
    stopping: bool = False
    leaving: bool = False  # stopping, since a new process takes the clients now; those connected here are served first
    route_primaries: RoutePrimaries | None = None  # None: there are no routes, and everybody has the snapshot's primary
    most_clients: int = sys.maxsize  # what the file descriptors of this process allow

    @property
    def is_crowded(self) -> bool:
        """Whether one more client would exceed the limit of all processes together or of this one."""
        return (
            self.counters.clients > self.settings.smtp.max_connections or self.counters.own_clients > self.most_clients
        )
