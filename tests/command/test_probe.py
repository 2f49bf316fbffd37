"""`probe` on the running product: what it asks, what it shows and keeps, and what `ready` makes of it."""

from __future__ import annotations

import csv
import io
import json
import re
import smtplib
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from support.product import Product
from support.reactions import Close, Gate
from support.scripted_server import ScriptedServer
from support.terminal import typed
from support.waiting import wait_until

_MISSING = "550 5.1.1 no such user"
_KNOWN = {
    "RCPT TO:<no-such-mailbox-": _MISSING, "RCPT TO:<gone": _MISSING, "RCPT TO:<odd": "550 5.7.1 not from you",
    "RCPT TO:<slow": "450 4.2.0 later",
}  # fmt: skip


@pytest.fixture(scope="module")
def new() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="module")
def old() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, old: ScriptedServer, new: ScriptedServer) -> Iterator[Product]:
    folder = tmp_path_factory.mktemp("probe")
    known = {"smtp.domain": "relay.example"}
    backups = [f"new={new.address}"]
    with Product(folder, primary=f"old={old.address}", backups=backups, settings=known) as product:
        yield product


@pytest.fixture(autouse=True)
def as_known(new: ScriptedServer) -> None:
    new.replies = dict(_KNOWN)


def asked(running: Product, text: str | bytes, *words: str) -> tuple[int, str, str]:
    """Ask about the addresses of a file, as fast as can be."""
    data = text if isinstance(text, bytes) else text.encode()
    (running.directory / "list").write_bytes(data)
    done = running.run("probe", "new", "--recipients", "list", "--rate", "10000/s", *words)
    return done.returncode, done.stdout, done.stderr


def criterion(running: Product, number: int) -> Mapping[str, Any]:
    found = json.loads(running.run("ready", "new", "--json").stdout)
    return next(row for row in found["criteria"] if row["number"] == number)


def test_from_never_probed_to_ready(running: Product, new: ScriptedServer) -> None:
    """It fails with who does not exist, passes once they do, and is never sent a message."""
    assert (criterion(running, 12)["result"], criterion(running, 13)["result"]) == ("unknown", "unknown")
    status, shown, told = asked(running, "ann@a.example\ngone@a.example\nodd@a.example\n")
    assert (status, "gone@a.example" in shown, "ann@a.example" in shown) == (1, True, False), told
    failed = criterion(running, 12)
    assert (failed["result"], failed["age_s"] < 60) == ("fail", True)
    assert "1 of 3 does not exist at new" in failed["text"]
    assert "gone@a.example" in failed["text"]
    assert criterion(running, 13)["result"] == "warn"

    new.replies = {"RCPT TO:<no-such-mailbox-": _MISSING}
    status, shown, _ = asked(running, "ann@a.example\ngone@a.example\nodd@a.example\n")
    assert (status, criterion(running, 12)["result"]) == (0, "pass")
    assert "recipients exist at new" in criterion(running, 12)["text"]
    assert not new.messages
    assert "MAIL FROM:<postmaster@relay.example>" in new.commands
    (act,) = [json.loads(line) for line in running.run("audit", "--json").stdout.splitlines()][:1]
    assert (act["command"], act["after"]) == ("probe new", "exists 3")


def test_a_server_that_takes_anybody(running: Product, new: ScriptedServer) -> None:
    """Nobody is said to exist, which is not ready; it is a catch-all, which is a warning."""
    new.replies = {}
    status, shown, _ = asked(running, "ann@a.example\nbob@b.example\n")
    assert (status, "accepts anything in 2 of 2 domains" in shown) == (3, True)
    assert criterion(running, 12)["result"] == "unknown"
    assert (criterion(running, 13)["result"], "catch-all" in criterion(running, 13)["text"]) == ("warn", True)


_LIST = """\ufeff# who reads mail here\r
\r
<Ann@A.example>\r
ann@a.example\r
"o d d"@a.example\r
ü@a.example\r
"""


def test_a_list_as_people_have_it(running: Product, new: ScriptedServer) -> None:
    """A BOM, CRLF, comments, brackets, quotes, UTF-8, and one that is there twice; or a table with a header."""
    status, shown, told = asked(running, _LIST, "--json")
    rows = [json.loads(line) for line in shown.splitlines()]
    assert [row["address"] for row in rows[:-1]] == ["ann@a.example", "o d d@a.example", "ü@a.example"]
    assert (status, rows[-1]["exist"], rows[-1]["asked"]) == (0, 3, 3)
    assert "1 address is there more than once" in told
    assert 'RCPT TO:<"o d d"@a.example>' in new.commands
    status, shown, _ = asked(running, "name;email\nAnn;ann@a.example\nBob;gone@a.example\n", "--csv")
    answers = list(csv.DictReader(io.StringIO(shown)))
    assert [(row["address"], row["result"], row["accepted"]) for row in answers] == [
        ("ann@a.example", "exists", "yes"), ("gone@a.example", "does not exist", "no"),
    ]  # fmt: skip
    assert status == 1


@pytest.mark.parametrize(
    ("data", "words", "why"),
    [
        (b"ann@a.example\nbob\n@b.example\nx y@c.example\n", (), ["line 2: bob", "line 3: @b.example: a", "line 4"]),
        (b"ann@a.example\nb\xfcb@a.example\n", (), ["line 2: no UTF-8"]),
        (b"# nobody\n", (), ["no address is in it"]),
        (b"ann@a.example\n", ("--rate", "fast"), ["--rate"]),
        (b"ann@a.example\n", ("--sender", "a b"), ["--sender"]),
        (b"ann@a.example\n", ("--route", "none"), ["no route 'none'"]),
        (b"ann@a.example\n", ("--csv", "--json"), ["not both"]),
        (b"ann@a.example\n", ("--per-connection", "0"), ["--per-connection"]),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_asks_nobody(
    running: Product, new: ScriptedServer, data: bytes, words: tuple[str, ...], why: list[str]
) -> None:
    """A line for each that is wrong, exit status 2, and nothing is done."""
    before = len(new.commands)
    status, _, told = asked(running, data, *words)
    assert (status, len(new.commands)) == (2, before), told
    assert all(text in told for text in why), told


def test_others_that_cannot_be_meant(running: Product) -> None:
    """No such server, no such file, nobody named."""
    several = ("new", "--refused", "--seen", "1d")
    for words in (("nwe", "--refused"), ("new", "--recipients", "nowhere"), ("new",), several, ("new", "--seen", "x")):
        done = running.run("probe", *words)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), words


def test_it_goes_on_where_it_was_interrupted(running: Product, new: ScriptedServer) -> None:
    """By Ctrl-C, a server that closes or hangs: what was answered is kept, for us alone, and is not asked again."""
    names = [f"u{n}@a.example" for n in range(6)]
    gate = Gate()
    new.replies["RCPT TO:<u3@"] = gate
    (running.directory / "list").write_text("\n".join(names))
    command = ("probe", "new", "--recipients", "list", "--rate", "10/s")
    seen = typed(running, *command, interrupt_at="asking new")
    gate.open()
    assert (seen.status, "left, and the same command goes on" in seen.text) == (130, True), seen.text
    kept = running.state_dir / "probe-new.listed.jsonl"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600

    new.replies["RCPT TO:<u3@"] = ("421 4.3.2 closing", Close())
    status, shown, told = asked(running, "\n".join(names))
    assert (status, "the same command goes on from here" in told) == (3, True), told
    assert "421 4.3.2 closing" in criterion(running, 12)["text"]
    with kept.open("a") as file:
        file.write('{"address": "torn')  # a process that was killed
    new.replies = dict(_KNOWN)
    mark = len(new.commands)
    status, shown, told = asked(running, "\n".join(names))
    assert (status, "going on with 3 answers" in told) == (0, True), told
    assert [re.findall("u\\d", line) for line in new.commands[mark:] if "<u" in line] == [["u3"], ["u4"], ["u5"]]
    assert re.search(r"exists +6\n", shown)
    asked(running, "\n".join(names))
    assert sum("<u0@" in line for line in new.commands[mark:]) == 1, "a new one asks about everybody"


def test_whom_the_primary_has_taken_and_refused(running: Product, old: ScriptedServer, new: ScriptedServer) -> None:
    """Each once, from the trace; whom it refused for another reason, or took after all, is not asked about."""
    old.replies = {"RCPT TO:<un": _MISSING, "RCPT TO:<odd": "550 5.7.1 not from you"}
    with smtplib.SMTP("127.0.0.1", running.smtp_port) as client:
        for whom in ("ann@a.example", "bob@a.example", "unknown@a.example", "until@a.example", "odd@a.example"):
            with suppress(smtplib.SMTPRecipientsRefused):
                client.sendmail("s@a.example", [whom], "Subject: x\r\n\r\nx\r\n")
        old.replies = {}
        client.sendmail("s@a.example", ["until@a.example", "Ann@a.example"], "Subject: x\r\n\r\nx\r\n")

    def asked_about(*words: str) -> tuple[int, dict[str, str]]:
        done = running.run("probe", "new", *words, "--rate", "1000/s", "--json")
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        return done.returncode, {row["address"]: row["result"] for row in rows if row["kind"] == "recipient"}

    everybody = dict.fromkeys(("ann@a.example", "bob@a.example", "until@a.example"), "exists")
    wait_until(lambda: asked_about("--seen", "1h") == (0, everybody))
    assert asked(running, "gone@a.example\n")[0] == 1
    assert asked_about("--seen", "1h") == (0, everybody)
    assert criterion(running, 12)["result"] == "fail", "those of the list are still missing"
    assert asked_about("--refused") == (1, {"unknown@a.example": "exists"})
    assert criterion(running, 13)["result"] == "warn"
    assert "new accepts 1 of 1 recipient that old refuses" in criterion(running, 13)["text"]
    new.replies["RCPT TO:<unknown"] = _MISSING
    assert asked_about("--refused") == (0, {"unknown@a.example": "does not exist"})
    assert criterion(running, 13)["result"] == "pass"
    hashed = running.run("probe", "new", "--seen", "1h", "--set", "trace.addresses=hashed")
    assert (hashed.returncode, "trace.addresses is hashed" in hashed.stderr) == (3, True)
