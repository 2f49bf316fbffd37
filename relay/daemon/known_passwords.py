"""The servers with a password or TLS files that these settings have named: the ledger alone is not believed about them.

Whoever can write to Redis can define a destination at an address of theirs, with any file or variable that we can
read as its password, its CAs or its key. So such a reference is followed only where the settings here have named just
this destination, now or earlier: ``<state_dir>/named.json`` keeps what they had. A file that is missing, another
user's or makes no sense has named nothing; one that cannot be written is told, and then only what is named now counts.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from relay import maillog, private_files
from relay.mail.destination import Destination
from relay.mail.stored import parsed

_KEPT = 1000


def remember(state_dir: Path, destinations: Iterable[Destination]) -> frozenset[str]:
    """Note these destinations, and return the stored forms of all that have been noted."""
    path = state_dir.absolute() / "named.json"
    old: list[str] = []
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = parsed(private_files.read(path.parent, path.name))
        old = [Destination.from_json(text).to_json() for text in found]
    new = [d.to_json() for d in destinations if d.password_from or files_of(d)]
    kept = list(dict.fromkeys([*old, *new]))[-_KEPT:]
    if kept != old:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            private_files.write(path.parent, path.name, json.dumps(kept, indent=1).encode())
        except OSError as error:
            maillog.notice("warning", "servers with a password cannot be noted", file=str(path), reason=str(error))
    return frozenset(kept)


def files_of(destination: Destination) -> list[str]:
    """Return the files that a destination's TLS needs."""
    return [file for file in (destination.ca_file, destination.tls_certificate, destination.tls_key) if file]
