"""The share of a spooled message: the backups for which it is imported now, and those that must wait."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from relay.ledger.changes import Admitted, Released
from relay.spool.files import Loaded


class Share(NamedTuple):
    """What is imported now, and the names of the backups whose copies stay on disk."""

    admitted: Admitted
    left: tuple[str, ...]

    @classmethod
    def of(cls, loaded: Loaded, welcome: Collection[str]) -> Share:
        """Divide a message between the ``welcome`` backups and the others."""
        names = loaded.released.destinations
        released = loaded.released._replace(destinations=tuple(name for name in names if name in welcome))
        admitted = Admitted(loaded.entry.name, loaded.record, released)
        return cls(admitted, tuple(name for name in names if name not in welcome))

    @property
    def released(self) -> Released:
        return self.admitted.released

    @property
    def octets(self) -> int:
        """The octets that Redis needs for it."""
        return len(self.admitted.record) if self.released.destinations else 0


def left(shares: Sequence[Share]) -> dict[str, list[str]]:
    """Return the files that must wait: backup -> file names."""
    found: dict[str, list[str]] = {}
    for share in shares:
        for name in share.left:
            found.setdefault(name, []).append(share.admitted.file)
    return found
