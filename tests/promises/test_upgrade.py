"""An older smtp-dup's Redis and spool are opened by this one in place, and all that they owe arrives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support import old_state
from support.old_state import KINDS, Owed
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

STATES = sorted((Path(__file__).parents[1] / "old_state").glob("*.tar.gz"))


def test_there_are_states() -> None:
    """Plain and sealed ones, of more than one version."""
    assert {path.name.partition(".")[0].rpartition("-")[2] for path in STATES} == {"plain", "sealed"}
    assert len({path.name.partition("-")[0] for path in STATES}) > 1


@pytest.mark.long
@pytest.mark.parametrize("state", STATES, ids=lambda path: path.name.partition(".")[0])
def test_what_an_older_version_owes_arrives(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer, state: Path
) -> None:
    """Pending, deferred, failed, uncertain and spooled mail: every recipient gets it once, as its client sent it."""
    # The state gets older every day: nothing of it may be given up or expire.
    settings = {"retry.give_up": "30000d", "failed.ttl": "30000d", "retry.first": "1", "workers.sweep": "1"}
    files = {"settings.toml": old_state.SETTINGS_FILE.format(backup.address)}
    it = product(start=False, primary=primary.address, settings=settings, files=files)
    owed = old_state.unpack(state, it.state_dir)
    assert {message.kind for message in owed} == set(KINDS)
    keys = it.state_dir / "keys"
    it.settings["storage.key_file"] = str(keys) if keys.exists() else ""
    it.start()
    rows = it.json("failed", "list")
    wanted = sorted(recipient for message in owed if message.kind == "failed" for recipient in message.recipients)
    assert sorted(recipient for row in rows for recipient in row["recipients"]) == wanted
    assert it.run("failed", "retry", "--all").returncode == 0
    assert it.run("queue", "flush").returncode == 0

    def arrived() -> list[tuple[str, str, str]]:
        """Return subject, recipient and digest of all that has come."""
        found = []
        for transaction in backup.messages:
            subject, told = transaction.header("Subject") or "", old_state.digest(transaction.content)
            found += [(subject, recipient, told) for recipient in transaction.recipients]
        return sorted(found)

    expected = sorted((message.subject, r, message.digest) for message in owed for r in message.recipients)
    wait_until(lambda: len(arrived()) >= len(expected), 60, lambda: f"{missing(owed, arrived())}\n{it.log[-3000:]}")
    assert arrived() == expected
    wait_until(lambda: it.summary("new")["pending"] == 0, 30, "copies stay pending", 0.2)
    assert it.json("queue", "verify") == []
    assert not it.json("failed", "list")
    assert not [event for event in it.events if event["event"] in {"spool file set aside", "unreadable message"}]
    assert it.stop() == 0


def missing(owed: list[Owed], arrived: list[tuple[str, str, str]]) -> str:
    there = {subject for subject, _, _ in arrived}
    return "not there: " + ", ".join(message.subject for message in owed if message.subject not in there)
