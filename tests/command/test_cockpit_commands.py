"""`ready`, `flow` and `top` on the running product: what they show, and how they end."""

from __future__ import annotations

import json
import smtplib
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.ledger import keys
from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.terminal import typed
from support.waiting import wait_until

_QUICK = {
    "ready.days": "0",
    "ready.min_messages": "20",
    "ready.calm": "0",
    "ready.probe_age": "0",
    "ready.arrived_age": "0",
    "ready.check_every": "0.5",
    "smtp.domain": "relay.example",
}


@pytest.fixture(scope="module")
def old() -> Iterator[ScriptedServer]:
    with ScriptedServer(extensions=[*EXTENSIONS, "DSN"]) as server:
        yield server


@pytest.fixture(scope="module")
def new() -> Iterator[ScriptedServer]:
    with ScriptedServer({"RCPT TO:<bad": "550 5.1.1 no such mailbox"}) as server:
        yield server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, old: ScriptedServer, new: ScriptedServer) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("cockpit")
    with Product(folder, primary=old.address, backups=[f"new={new.address}"], settings=_QUICK) as product:
        with smtplib.SMTP("127.0.0.1", product.smtp_port) as client:
            for number in range(30):
                whom = "bad@b.example" if number == 7 else f"user{number}@b.example"
                options = ["BODY=8BITMIME"] if number % 2 else []
                client.sendmail("a@a.example", [whom], f"Subject: {number}\r\n\r\nhello\r\n", options)
        yield product


def verdict(product: Product, *words: str) -> dict[str, object]:
    return json.loads(product.run("ready", "new", "--json", *words).stdout)


def result(product: Product, name: str) -> str:
    found = {row["criterion"]: row["result"] for row in verdict(product)["criteria"]}
    return str(found.get(name, "out"))


def test_the_verdict_turns_when_the_cause_is_mended(running: Product, new: ScriptedServer) -> None:
    """What the new server refuses keeps it from being ready; after it is mended and retried, it is."""
    wait_until(lambda: result(running, "refusals") == "fail" and result(running, "relays") == "pass", 60)
    wait_until(lambda: result(running, "volume") == "pass" and result(running, "way back") == "pass", 60)
    before = running.run("ready", "new")
    assert (before.returncode, "550 5.1.1" in before.stdout, "NOT READY" in before.stdout) == (1, True, True)
    plugin = running.run("ready", "new", "--nagios")
    assert (plugin.returncode, plugin.stdout.startswith("SMTP-DUP CRITICAL - new NOT READY")) == (2, True)
    rows = {row["extension"]: row for row in verdict(running)["ehlo"]}
    assert (rows["DSN"]["old"], rows["DSN"]["new"], rows["8BITMIME"]["used"]) == ("yes", "-", "15 messages")

    new.replies.clear()
    assert running.run("failed", "retry", "--all", "--wait").returncode == 0
    wait_until(lambda: running.run("ready", "new").returncode == 0, 60)
    plugin = running.run("ready", "--nagios")
    assert (plugin.returncode, plugin.stdout) == (0, "SMTP-DUP OK - new READY: 13 criteria\n")
    told = running.run("ready", "new", "--explain").stdout
    assert "ready.max_open" in told
    assert "refuses no recipient" in told


def test_a_host_says_mail_to_the_old_server_and_sends_nothing(running: Product, old: ScriptedServer) -> None:
    """Connection, EHLO, MAIL and RSET, QUIT: as a worker would be let in, from a postmaster of ours."""

    def looks() -> list[list[str]]:
        return [c.commands for c in old.connections if "MAIL FROM:<postmaster@relay.example>" in c.commands]

    wait_until(lambda: any(commands[-1] == "QUIT" for commands in looks()), 30)
    assert not any("DATA" in commands for commands in looks())
    assert {"RSET", "QUIT"} <= set(looks()[0])


def test_flow_counts_what_came_and_what_became_of_it(running: Product, new: ScriptedServer) -> None:
    """Each message once at the primary, each copy once at the backup, in the minutes and in the hours."""
    wait_until(lambda: running.summary()["delivered"] >= 29)
    new.replies.clear()
    assert running.run("failed", "retry", "--all", "--wait").returncode == 0

    def seen(*words: str) -> tuple[int, int, int]:
        rows = [json.loads(line) for line in running.run("flow", "--json", *words).stdout.splitlines()]
        copies = [row["destinations"].get("new", {}) for row in rows]
        return (
            sum(row["accepted"] for row in rows),
            sum(c.get("copied", 0) for c in copies),
            sum(c.get("delivered", 0) for c in copies),
        )

    wait_until(lambda: seen() == (30, 30, 30), 60, lambda: f"{seen()}")
    assert seen("--minutes", "30") == (30, 30, 30)
    shown = running.run("flow").stdout
    assert "(primary)" in shown
    assert "30/0/1" in shown
    assert running.run("flow", "--hours", "1", "--minutes", "1").returncode == 2


def test_top_on_a_terminal(running: Product) -> None:
    """It draws, sorts and freezes by its keys, ends with q, and Ctrl-C ends it as it ends every command."""
    ended = typed(running, "top", "--interval", "0.2", answer="sq", columns=80)
    assert ended.status == 0
    interrupted = typed(running, "top", "--interval", "0.2", answer="sd ", columns=80, interrupt_at="frozen")
    assert interrupted.status == 130
    assert "by pending" in interrupted.text
    early = typed(running, "top", columns=80, interrupt_at="q quit")
    assert early.status == 130
    for seen in (ended, interrupted, early):
        assert "pending" in seen.text
        assert "Traceback" not in seen.text
        assert seen.text.rstrip().endswith("\x1b[?1049l")  # the screen is as it was before


def test_top_once(running: Product) -> None:
    """One frame for a file, a pipe or a program."""
    shown = running.run("top", "--once").stdout
    assert shown.startswith("smtp-dup ")
    assert "2 relay processes" in shown or "1 relay process" in shown
    found = json.loads(running.run("top", "--once", "--json").stdout)
    assert {row["name"] for row in found["destinations"]} >= {"new"}
    wait_until(lambda: "550 5.1.1" in running.run("top", "--once").stdout, 30)


@pytest.mark.parametrize("words", [("ready", "new"), ("ready", "--nagios"), ("flow",), ("top", "--once")])
def test_without_redis_nothing_can_be_said(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Status 3, and a plug-in's UNKNOWN on its output."""
    away = Product(tmp_path, primary="127.0.0.1:9", backups=["new=127.0.0.1:10"], redis_url="unix:///nowhere.sock")
    done = away.run(*words)
    assert done.returncode == 3
    assert ("SMTP-DUP UNKNOWN" in done.stdout) == ("--nagios" in words)


def test_nobody_of_that_name_is_a_usage_error(running: Product) -> None:
    """It says who there is, and keys of ours are named in one place."""
    done = running.run("ready", "nwe")
    assert (done.returncode, "there is: new" in done.stderr) == (2, True)
    assert keys.FLOW.startswith(keys.PREFIX)
