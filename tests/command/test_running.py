"""Commands find the settings of a running smtp-dup without its flags, and show where they differ."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import relay
from relay.config.differences import differences
from relay.config.loader import load
from relay.daemon import control, running
from relay.daemon.control import Control
from support import forked
from support.product import Product
from support.scripted_server import ScriptedServer

FLAGS = {
    "relay.destination_primary": "smtp://u:old-secret@old.example:25",
    "relay.destination_backups": "new=smtp://u:x-secret@new.example:25,gone.example:25",
    "redis.url": "redis://:r-secret@redis.example:6379/0",
}


def run(product: Product, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as in another terminal: only the state folder is known there."""
    kept = {name: value for name, value in product.environment.items() if not name.startswith("SMTP_DUP_")}
    env = {**kept, "SMTP_DUP_STATE_DIR": str(product.state_dir), **variables}
    return forked.run(words, cwd=product.state_dir, env=env, input="", timeout=60)


def test_commands_without_settings(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """They take those of the one that runs and say so; with settings of their own they have these; `check` tells."""
    up = product(
        settings={"relay.destination_primary": "", "relay.destination_backups": ""},
        flags=["--primary", primary.address, "--backup", f"new={backup.address}", "--failed-ttl", "9d"],
    )
    up.send("a@example.com", "b@example.com")
    backup.wait_for(1)
    assert up.process
    told = f"smtp-dup: using the settings of the smtp-dup that runs here (`up`, process {up.process.pid})"
    summary = run(up, "queue", "summary", "--json")
    assert (summary.returncode, summary.stderr.strip()) == (0, told)
    assert json.loads(summary.stdout.splitlines()[0])["destination"] == "new"
    check = run(up, "check")
    assert check.returncode == 0, check.stdout + check.stderr
    assert primary.address in check.stdout
    assert "9d" in check.stdout
    assert check.stderr.strip() == told
    other = run(up, "check", "--primary", primary.address, "--failed-ttl", "8d", "--json")
    drift = {row["key"]: row for row in map(json.loads, other.stdout.splitlines()) if row["kind"] == "drift"}
    assert (drift["failed.ttl"]["before"], drift["failed.ttl"]["after"]) == ("9d", "8d")
    assert drift["smtp.listen"]["takes_restart"]
    assert drift["backup.new"]["after"] == "none"
    assert "using" not in other.stderr
    # The container's health check finds it without our code, which takes it long to load (-I -S: it cannot).
    health = [sys.executable, "-I", "-S", str(Path(relay.__file__).parents[1] / "deploy/docker/health.py")]
    asked = subprocess.run(
        health, check=False, env={"SMTP_DUP_STATE_DIR": str(up.state_dir)}, capture_output=True, text=True
    )
    assert (asked.returncode, asked.stdout) == (0, "/readyz: 200\n")
    file = up.state_dir / "running-up.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    up.kill()
    assert "must be given" in run(up, "check").stderr, "what a dead one has left is nothing"
    file.write_text(text)
    assert running.read(up.state_dir) is None


def test_a_broken_settings_file(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Commands, undo among them, go on with what runs, and say why; `check`, a bad flag or variable end with 2."""
    settings = {"relay.destination_primary": "", "relay.destination_backups": ""}
    up = product(settings=settings, flags=["--primary", primary.address, "--backup", f"new={backup.address}"])
    file = up.state_dir / "settings.toml"
    for text, fault in (
        ("[retry]\nfirst = 'soon'\n", f"{file.name}:2: retry.first"),
        ("[retry\n", file.name),
        ("nonsense = 1\n[log]\nlevel = 'loud'\n", f"{file.name}:1: nonsense"),
    ):
        file.write_text(text)
        told = run(up, "topology")
        assert (told.returncode, len(told.stderr.splitlines())) == (0, 1), told.stderr
        assert "using the settings of the smtp-dup that runs here" in told.stderr
        assert fault in told.stderr
    undo = run(up, "undo", "--yes")
    assert undo.returncode == 1, "nothing has been promoted"
    assert run(up, "check").returncode == 2
    flag = run(up, "topology", "--retry-first", "soon")
    variable = run(up, "topology", SMTP_DUP_RETRY__FIRST="soon")
    assert flag.returncode == variable.returncode == 2
    assert "using" not in flag.stderr + variable.stderr
    up.kill()
    assert run(up, "topology").returncode == 2


def test_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that was given comes back, with the variables that hold passwords; damaged or foreign files are none."""
    monkeypatch.setenv("NEW_PASSWORD", "z-secret")
    file = tmp_path / "settings.toml"
    file.write_text(
        f'[retry]\nfirst = 90\n[[backup]]\nname = "third"\nurl = "smtp://u@third.example"\n'
        f'password_from = "env:NEW_PASSWORD"\ndomains = ["a.example"]\n[redis]\nurl = "{FLAGS["redis.url"]}"\n'
    )
    flags = {"relay.destination_primary": FLAGS["relay.destination_primary"], "config": str(file)}
    flags["backup[third].sender"] = "null"
    settings = load(flags, environ=dict(os.environ), directories=())
    heard = Control(tmp_path, "up", lambda *_: None, lambda _: None, lambda *_: None)
    heard.open()
    try:
        running.write(tmp_path, "up", settings, 3)
        found = running.read(tmp_path)
        assert found
        assert (found.pid, found.generation, found.role) == (os.getpid(), 3, "up")
        monkeypatch.delenv("NEW_PASSWORD")
        again = found.settings({}, require_primary=True)
        assert differences(settings, again) == []
        assert again.backups == settings.backups
        assert again.backups[0].password == "z-secret"
        assert again.backups[0].sender == "null"
        for damage in (b"", b"[]", b"{}", b"\xff", (tmp_path / "running-up.json").read_bytes()[:-40], b"[" * 100_000):
            (tmp_path / "running-up.json").write_bytes(damage)
            assert running.read(tmp_path) is None
    finally:
        heard.close()
    assert not control.is_running(tmp_path, "up")


def test_differences_show_no_secret() -> None:
    """Each option that differs is a row; a changed password says that it is another, and shows neither."""
    before = load(FLAGS, environ={}, directories=())
    changed = {key: value.replace("secret", "other") for key, value in FLAGS.items()}
    after = load({**changed, "smtp.max_hops": "7"}, environ={}, directories=())
    rows = differences(before, after)
    assert [row.key for row in rows] == [
        "smtp.max_hops",
        "redis.url",
        "relay.destination_primary.password",
        "backup.new.password",
    ]
    assert rows[0][1:] == ("50", "7", False)
    assert rows[1].takes_restart
    assert all(row.after.endswith("(another)") for row in rows[1:])
    assert not any(word in str(rows) for word in ("secret", "x-other", "old-other"))
    assert differences(before, load(FLAGS, environ={}, directories=())) == []


def test_what_runs_stays_where_a_restart_is_taken() -> None:
    """What is checked is what would run: a new option that does not go with an old address is a fault."""
    before = load({"relay.destination_primary": "old.example", "smtp.listen": "0.0.0.0:2525"}, {}, ())
    wanted = {"relay.destination_primary": "old.example", "smtp.allowed_networks": "0.0.0.0/0"}
    load(wanted, {}, ())  # only this machine would be let in, where nothing else listens
    with pytest.raises(Exception, match="open relay"):
        load(wanted, {}, (), running=before.layers)
    kept = load({**wanted, "smtp.allowed_networks": "192.0.2.0/24"}, {}, (), running=before.layers)
    assert kept.smtp.listen == "0.0.0.0:2525"


@pytest.mark.parametrize("name", ["short", "a" * 120])
def test_the_socket_in_a_folder_of_any_length(tmp_path: Path, name: str) -> None:
    """Questions reach it also where the path is longer than a socket's may be; one that is dead is none."""
    folder = tmp_path / name
    folder.mkdir()
    watched: dict[int, Callable[[], None]] = {}
    heard = Control(
        folder, "up", watched.__setitem__, lambda n: watched.pop(n, None), lambda asked, tell: tell({"heard": asked})
    )
    heard.open()
    with control.lines(folder) as lines:
        (line,) = lines
        next(iter(watched.values()))()
        line.ask({"ask": "state"})
        list(watched.values())[1]()
        assert line.hear() == {"heard": {"ask": "state"}}
        assert line.hear(0.01) is None
        line._sock.sendall(b"rubbish\n")
        list(watched.values())[1]()
        with pytest.raises(control.Silent):
            line.hear()
    assert stat.S_IMODE((folder / "up.sock").stat().st_mode) == 0o600
    heard.close()
    with control.lines(folder) as lines:
        assert lines == []
