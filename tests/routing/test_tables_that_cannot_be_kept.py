"""Tables whose file has changed while the state folder cannot be written: what was read before holds, it is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.routing import table_store
from relay.routing.table_file import BadTable
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

_ROUTE = """
[[server]]
name = "shop"
url = "{shop}"
[[route]]
name = "shop"
match = {{ recipients = "file:{table}" }}
primary = "shop"
"""


def fill(disk: Path) -> Path:
    """Leave no octet free on a disk; returns the file that has them all."""
    path = disk / "all-the-rest"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    os.write(handle, b"x" * size)
            except OSError:
                continue
    finally:
        os.close(handle)
    return path


def test_a_file_that_has_changed_and_was_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a fault once it should have been; so is one that has gone. What was noted as a fault stays what it is."""
    path, state = tmp_path / "table", tmp_path / "state"

    def fault() -> str:
        found = table_store.standing(state, path)
        assert found is not None
        return found.fault

    path.write_text("x@example.com\n")
    assert table_store.standing(state, path) is None
    table_store.update(state, path, (), fold=True)
    assert fault() == ""
    path.write_text("x@example.com\ny@example.com\n")
    assert fault() == ""
    monkeypatch.setattr(table_store, "_LATE_SECONDS", 0.0)
    assert f"not taken since: {state}/tables must be writable" in fault()
    path.unlink()
    assert fault() == "it cannot be read: No such file or directory"
    path.write_text("x@\n")
    with pytest.raises(BadTable):
        table_store.update(state, path, (), fold=True)
    assert fault().startswith("line 1")
    path.write_text("x@example.com\n")
    assert fault().startswith("line 1")
    table_store.update(state, path, (), fold=True)
    assert fault() == ""


@pytest.mark.long
@pytest.mark.timeout(200)
def test_on_a_full_disk(
    product: Callable[..., Product],
    scripted: Callable[..., ScriptedServer],
    small_disk: Callable[[int], Path],
    redis_url: str,
    tmp_path: Path,
) -> None:
    """/readyz, check, route and route list say that a changed file does not count; with room again it does."""
    old, shop = scripted(), scripted()
    table, disk = tmp_path / "table", small_disk(8)
    table.write_text("x@example.com\n")
    relay = product(
        command="relay",
        primary=f"old={old.address}",
        redis_url=redis_url,
        settings={**QUICK, "state_dir": str(disk / "state"), "spool.min_free": "0"},
        files={"settings.toml": _ROUTE.format(shop=shop.address, table=table)},
    )
    rest = fill(disk)
    table.write_text("x@example.com\ny@example.com\n")
    relay.wait_for_log("table refused")
    wait_until(lambda: "and not taken since" in relay.get("/readyz")[1], message=lambda: relay.get("/readyz")[1])
    relay.send("a@example.com", "y@example.com")
    relay.send("a@example.com", "x@example.com")
    assert [m.recipients for m in old.messages] == [["y@example.com"]]
    assert [m.recipients for m in shop.messages] == [["x@example.com"]]
    for words in (("check",), ("route", "list")):
        done = relay.run(*words, "--wide")
        assert done.returncode == 1, done.stdout
        assert "and not taken since" in done.stdout, done.stdout
    done = relay.run("route", "y@example.com")
    assert "and not taken since" in done.stdout + done.stderr
    rest.unlink()
    relay.wait_for_log("table read")
    wait_until(lambda: "not taken" not in relay.get("/readyz")[1])

    def is_taken() -> bool:
        relay.send("a@example.com", "y@example.com")
        return any(m.recipients == ["y@example.com"] for m in shop.messages)

    wait_until(is_taken, interval=0.5)
    assert relay.run("route", "list").returncode == 0
