"""Data of the embedded Redis are opened by no server that is older than the one that wrote them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay.redisio import embedded, versions
from relay.redisio.versions import Version


@pytest.mark.parametrize(
    ("server", "writer", "may"),
    [
        (("redis", (7, 0)), ("redis", (7, 0)), True),
        (("redis", (7, 2)), ("redis", (7, 0)), True),
        (("redis", (7, 0)), ("redis", (7, 2)), False),
        (("valkey", (9, 1)), ("redis", (7, 2)), True),
        (("valkey", (9, 1)), ("redis", (7, 4)), False),
        (("redis", (8, 0)), ("valkey", (8, 0)), False),
        (("valkey", (8, 1)), ("valkey", (9, 0)), False),
        (("valkey", (10, 0)), ("valkey", (9, 1)), True),
    ],
)
def test_who_reads_what(server: tuple[str, tuple[int, int]], writer: tuple[str, tuple[int, int]], may: bool) -> None:
    """A newer server of the same name reads what an older one wrote; Valkey reads Redis up to 7.2; nothing else."""
    assert Version(*server).reads(Version(*writer)) is may


def _program(folder: Path, words: str) -> Path:
    program = folder / "redis-server"
    program.write_text(f"#!/bin/sh\necho '{words}'\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize("words", ["", "no version", "Redis server v=x.y", "Redis server v=99999999.1"])
def test_a_program_that_does_not_say_its_version_is_not_judged(tmp_path, words):
    """Nor is one that is not there, or data of which nobody has noted who wrote them."""
    assert versions.of(_program(tmp_path, words)) is None
    assert versions.of(tmp_path / "nowhere") is None
    assert versions.objection(tmp_path, tmp_path, Version("redis", (7, 0))) == ""
    (tmp_path / "written-by").write_text("anything\n")
    assert versions.recorded(tmp_path) is None


def test_an_older_server_does_not_open_newer_data(tmp_path, monkeypatch):
    """It is refused in one line before it is started, and the data stay as they are."""
    process = embedded.start(tmp_path / "state")
    embedded.wait_ready(tmp_path / "state", 60, process)
    embedded.stop(process)
    data = embedded.folder(tmp_path / "state")
    wrote = versions.recorded(data)
    assert wrote == versions.of(embedded.find_server())
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (data / "appendonlydir").iterdir())
    older = _program(tmp_path, "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0")
    monkeypatch.setattr(embedded, "find_server", lambda *_: older)
    (data / "written-by").write_text("valkey 9.1\n")
    with pytest.raises(embedded.DataTrouble, match=r"is redis 7\.0, and the data in .* are of valkey 9\.1") as caught:
        embedded.start(tmp_path / "state")
    assert "\n" not in str(caught.value)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (data / "appendonlydir").iterdir()) == before
    os.close(embedded.lock(tmp_path / "state"))  # and the folder was given back
