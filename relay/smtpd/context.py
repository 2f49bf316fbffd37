"""The front of one relay process: what all its conversations share, and who is talking at the moment."""

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
    """A client's conversation, as a process sees it that is to stop."""

    def stop(self, *, impatient: bool) -> None:
        """End an idle conversation now; one in a transaction after it, or, impatient, before its DATA."""


@dataclass(slots=True)
class Context:
    """What the conversations of one relay process share."""

    settings: Settings
    primary: Primary
    intake: Staging
    ids: IdSource
    seat: ProcessCounters
    credentials: Credentials = field(default_factory=Credentials)
    conversations: set[Stoppable] = field(default_factory=set)
    stopping: bool = False
    most_clients: int = sys.maxsize  # of this process, by its descriptors

    @property
    def is_crowded(self) -> bool:
        """Whether one client more is too many, for all processes together or for this one."""
        return self.seat.clients > self.settings.smtp.max_connections or self.seat.own_clients > self.most_clients
