"""What is known of a destination's server, as the hash ``smtpdup:health:<name>`` has it: told by its workers.

Whoever can write to Redis can write anything there: what makes no sense counts as not said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay.ledger import keys
from relay.mail.ids import text

_LONGEST = 1000  # characters of a reason that are read
_LATEST = 1e11  # seconds since the epoch that can be right


@dataclass(frozen=True, slots=True)
class Health:
    """A destination as its workers see it; ``reason`` and ``probe_at`` say something only where it is paused."""

    is_paused: bool = False
    reason: str = ""
    probe_at: float | None = None

    @classmethod
    def read(cls, connection: Any, destination: str) -> Health:
        """Ask Redis (a synchronous client)."""
        return cls.of(connection.hgetall(keys.HEALTH + destination))

    @classmethod
    def of(cls, fields: Mapping[bytes, bytes]) -> Health:
        """Read the hash."""
        if fields.get(b"state") != b"paused":
            return cls()
        return cls(True, text(fields.get(b"reason", b""))[:_LONGEST], moment(fields.get(b"probe_at")))


def moment(value: bytes | None) -> float | None:
    """Return a time, seconds since the epoch; None for what is none."""
    try:
        found = float(value or b"")
    except ValueError:
        return None
    return found if math.isfinite(found) and 0 < found < _LATEST else None
