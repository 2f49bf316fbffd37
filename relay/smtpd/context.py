"""What the command loops of one relay process share, and which of them run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Protocol

from relay.config.loader import Settings
from relay.mail.ids import IdSource
from relay.smtpd.credentials import Credentials
from relay.smtpd.primary import Primary
from relay.smtpd.shared_counters import ProcessCounters
from relay.smtpd.staging import Staging


class Stoppable(Protocol):
    """A command loop, as the process sees it that is to stop."""

    def stop(self, *, impatient: bool) -> None:
        """End an idle client's session now; one in a transaction after it, or, impatient, before its DATA."""


@dataclass(slots=True)
class Context:
    """What the command loops of one relay process share."""

    settings: Settings
    primary: Primary
    staging: Staging
    ids: IdSource
    counters: ProcessCounters
    credentials: Credentials = field(default_factory=Credentials)
    command_loops: set[Stoppable] = field(default_factory=set)
    stopping: bool = False
    leaving: bool = False  # stopping, since another process takes the clients now: whoever came to us is served first
    most_clients: int = sys.maxsize  # of this process, by its descriptors

    @property
    def is_crowded(self) -> bool:
        """Whether one client more is too many, for all processes together or for this one."""
        return (
            self.counters.clients > self.settings.smtp.max_connections or self.counters.own_clients > self.most_clients
        )
