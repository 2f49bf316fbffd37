"""What a host says of itself while it runs: which part of the work it does, and what its spool holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay.ledger import changes, hosts
from relay.spool import writer

_EVERY = 20.0  # seconds: a large spool takes a while to count


class HostReport:
    """Tells of one installation, by its place and role (up, relay, workers)."""

    def __init__(
        self, place: str, role: str, processes: int, spool: Path | None, still: Callable[[], list[str]] = list
    ) -> None:
        """``still`` returns the processes that stand still."""
        self._place = place
        self._role = role
        self._processes = processes
        self._spool = spool if role != "workers" else None
        self._still = still
        self._told: list[str] = []
        self._told_at = float("-inf")
        self._waiting = 0

    def tell(self, connection: Any) -> None:
        """Tell, if it is time again. Raises RedisError, and OSError where the spool cannot be read."""
        still = self._still()
        if time.monotonic() - self._told_at < _EVERY and still == self._told:
            return
        found = writer.summary(self._spool)
        self._waiting = found.messages
        hosts.tell(
            connection,
            self._place,
            self._role,
            self._processes,
            found.messages,
            found.oldest_age_s,
            changes.now(connection),
            still,
        )
        self._told = still
        self._told_at = time.monotonic()

    def leave(self, connection: Any) -> None:
        """Say no more; a spool that is not empty is not forgotten. Raises RedisError."""
        if not self._waiting:
            hosts.leave(connection, self._place)
