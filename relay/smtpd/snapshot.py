"""Who is the primary and who gets copies, as a transaction finds them at its MAIL and keeps them until its end.

A promotion gives the next transactions another snapshot. The one before is retired: its primary's connections are
closed with a QUIT when they come back, and its pool once the last transaction that has it has ended. Where only a route
is another the next snapshot has the same primary, and its connections go on.
"""

from __future__ import annotations

import asyncio

from relay.mail.destination import Destination
from relay.smtpd.primary import Primary


class Snapshot:
    """The roles of the transactions that have it."""

    def __init__(
        self, primary: Primary, backups: tuple[Destination, ...], epoch: int = 0, former: Snapshot | None = None
    ) -> None:
        """``former`` is the one that it takes the place of."""
        self.primary = primary
        self.backups = backups
        self.epoch = epoch
        self.in_use = 0  # transactions
        self._service: _Service = _Service(primary)
        if former is not None and former.primary is primary:
            self._service = former._service  # noqa: SLF001  (its own kind)
        elif former is not None:
            former.retire()

    def take(self) -> Snapshot:
        """Return it for one transaction more, which gives it back at its end."""
        self.in_use += 1
        self._service.in_use += 1
        return self

    def give_back(self) -> None:
        """Count a transaction that has ended."""
        self.in_use -= 1
        self._service.give_back()

    def retire(self) -> None:
        """Keep the primary for the transactions that have it, and no connection for another."""
        self._service.retire()


class _Service:
    """What the snapshots with the same primary share: the transactions that have it, and its end."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary
        self.in_use = 0
        self._is_retired = False
        self._closing: asyncio.Task[None] | None = None

    def give_back(self) -> None:
        self.in_use -= 1
        if self._is_retired and not self.in_use:
            self._close()

    def retire(self) -> None:
        self._is_retired = True
        self._primary.pool.renew()
        if not self.in_use:
            self._close()

    def _close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._primary.pool.close())
