"""A spooled message's share: the backups for which it comes into the ledger now, and those that must wait."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from relay.ledger.changes import Admitted, Released
from relay.spool.files import Loaded


class Share(NamedTuple):
    """What comes in now, and the names of the backups whose copies stay on disk."""

    admitted: Admitted
    left: tuple[str, ...]

    @classmethod
    def of(cls, loaded: Loaded, welcome: Collection[str]) -> Share:
        """Share a message out to the backups that may have it now, and the others."""
        names = loaded.released.destinations
        released = loaded.released._replace(destinations=tuple(name for name in names if name in welcome))
        admitted = Admitted(loaded.entry.name, loaded.record, released)
        return cls(admitted, tuple(name for name in names if name not in welcome))

    @property
    def released(self) -> Released:
        return self.admitted.released

    @property
    def octets(self) -> int:
        """What Redis must hold."""
        return len(self.admitted.record) if self.released.destinations else 0


def left(shares: Sequence[Share]) -> dict[str, list[str]]:
    """Return the files that must wait for a backup, by backup."""
    found: dict[str, list[str]] = {}
    for share in shares:
        for name in share.left:
            found.setdefault(name, []).append(share.admitted.file)
    return found
