"""`failed export`: one message to standard output, byte for byte, or many into a folder, a file each.

A file is there whole or not at all, is nobody else's to read, and is never written over. What cannot be read (its key
or its file is on another host, it is damaged) is told, and the rest goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from redis import Redis

from relay.cockpit.bulk_actions import BulkAction
from relay.cockpit.conditions import Given
from relay.cockpit.conditions import words as conditions
from relay.command import bulk
from relay.command.command_line import tell
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse
from relay.command.filters import read, read_for_change
from relay.command.output import Output
from relay.config.loader import Settings
from relay.ledger import archive
from relay.ledger.queries import UnknownId
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import is_id
from relay.mail.record import BodyElsewhere
from workers.queues import failed
from workers.queues.selection import FAILED


def export(
    settings: Settings, out: Output, words: tuple[str, ...], everything: bool, dry_run: bool, filters: Given
) -> int:
    """Write one failed message to standard output, or those that ids, conditions or --all name into a folder."""
    is_one = len(words) == 1 and not everything and read(filters).is_bare
    if is_one and not dry_run:
        return _one(settings, words[0])
    *ids, folder = words if words and not is_id(words[-1]) else (*words, "")
    if not folder and not dry_run:
        raise Misuse("several messages go into a folder: name it at the end")
    chosen = read_for_change(filters, ids, everything)
    with ledger_of(settings) as connection:
        writer = _Writer(connection, Path(folder), archive.folder(settings.state_dir))
        action = BulkAction(
            "failed export", "exported", FAILED, writer.write,
            skipped="{} left out: gone meanwhile, or in a file that is there already, or not to be read.",
            conditions=f"{conditions(filters, ids)} into {folder}",
        )  # fmt: skip
        status = bulk.run(connection, out, action, chosen, dry_run=dry_run, yes=True)
    for message_id, why in writer.unreadable.items():
        tell(f"{message_id}: {why}")
    return status or (NO if writer.unreadable else WELL)


def _one(settings: Settings, message_id: str) -> int:
    with ledger_of(settings) as connection:
        failed.show(connection, message_id)  # or it is not failed
        content = failed.export(connection, message_id, archive.folder(settings.state_dir))
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return WELL


class _Writer:
    """Puts messages into a folder, each once, at however many destinations it has failed."""

    def __init__(self, connection: Redis, folder: Path, moved: Path) -> None:
        self._connection = connection
        self._folder = folder
        self._moved = moved  # where bodies of failed copies are that left Redis
        self._written: set[str] = set()
        self.unreadable: dict[str, str] = {}

    def write(self, _destination: str, copies: Mapping[str, float]) -> int:
        """Write these. Returns how many are there now. Raises OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return sum(message_id in self._written or self._write(message_id) for message_id in copies)

    def _write(self, message_id: str) -> bool:
        path = self._folder / f"{message_id}.eml"
        if os.path.lexists(path):
            return False
        try:
            content = failed.export(self._connection, message_id, self._moved)
        except UnknownId:
            return False
        except (BodyElsewhere, MalformedRecord) as error:
            self.unreadable[message_id] = str(error)
            return False
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o600), "wb") as file:
            file.write(content)
        part.rename(path)
        self._written.add(message_id)
        return True
