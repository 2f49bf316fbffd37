"""The topology as this host has last followed it, in its state folder: for a start while Redis is away.

Every relay process of the host writes it, at the same time as the others: one after the other, and a higher epoch is
never replaced by a lower one. A file that is missing, another user's or makes no sense is none.
"""

from __future__ import annotations

from pathlib import Path

from relay import maillog, private_files
from relay.topology.state import LONGEST, Topology, Unreadable

_NAME = "topology.json"
_LOCK = "topology.lock"


def load(state_dir: Path) -> Topology | None:
    """Return what was remembered, if anything."""
    folder = state_dir.absolute()
    try:
        return Topology.from_json(private_files.read(folder, _NAME, LONGEST))
    except FileNotFoundError:
        return None
    except (OSError, Unreadable) as error:
        maillog.notice("warning", "who was promoted is not remembered", file=str(folder / _NAME), reason=str(error))
        return None


def save(state_dir: Path, topology: Topology) -> None:
    """Remember it, on stable storage, unless a later decision is remembered already. Raises OSError."""
    folder = state_dir.absolute()
    with private_files.locked(folder / _LOCK):
        before = load(folder)
        if before is None or before.epoch < topology.epoch or (before.epoch == topology.epoch and before != topology):
            private_files.write(folder, _NAME, topology.to_json().encode())
