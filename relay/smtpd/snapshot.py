"""Who is the primary and who gets copies, as a transaction finds them at its MAIL and keeps them until its end.

A promotion gives the next transactions another snapshot. The one before is retired: its primary's connections are
closed with a QUIT when they come back, and its pool once the last transaction that has it has ended.
"""

from __future__ import annotations

import asyncio

from relay.mail.destination import Destination
from relay.smtpd.primary import Primary


class Snapshot:
    """The roles of the transactions that have it."""

    def __init__(self, primary: Primary, backups: tuple[Destination, ...], epoch: int = 0) -> None:
        self.primary = primary
        self.backups = backups
        self.epoch = epoch
        self.in_use = 0  # transactions
        self._is_retired = False
        self._closing: asyncio.Task[None] | None = None

    def take(self) -> Snapshot:
        """Return it for one transaction more, which gives it back at its end."""
        self.in_use += 1
        return self

    def give_back(self) -> None:
        """Count a transaction that has ended."""
        self.in_use -= 1
        if self._is_retired and not self.in_use:
            self._close()

    def retire(self) -> None:
        """Keep it for the transactions that have it, and no connection for another."""
        self._is_retired = True
        self.primary.pool.renew()
        if not self.in_use:
            self._close()

    def _close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self.primary.pool.close())
