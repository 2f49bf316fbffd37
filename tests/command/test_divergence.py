"""`smtp-dup divergence`: what it shows of a backup that answers otherwise, and what it lets an operator do about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay.cockpit import divergence as seen
from relay.command import main
from relay.ledger import audit, keys, queries
from support.diverged_copies import Backup, deferred, refused
from support.ledger_contents import Contents

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new", "other")


@pytest.fixture
def new(contents: Contents) -> Backup:
    return Backup(contents)


@pytest.fixture
def run(redis_url: str, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        status = main.run(["divergence", *words, "--redis", redis_url])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_nothing_is_open(run: Run) -> None:
    """Status 0, and a line that says so."""
    assert run() == (0, "Nothing is open.\n", "")
    assert run("--all") == (0, "Nothing has been refused or put off.\n", "")
    assert run("--json") == (0, "", "")


def test_what_is_open(contents: Contents, new: Backup, run: Run) -> None:
    """Status 1, a line for each reason, the most recipients first; --json has every field and example ids."""
    ids = [contents.pending("ann@a.test", "bob@b.test"), contents.pending("cid@a.test")]
    new.attempt(ids[0], dict.fromkeys(range(2), refused("550 5.1.1 <ann@a.test> unknown")))
    new.attempt(ids[1], {0: refused("552 5.2.2 full")})
    status, text, _ = run()
    assert status == 1
    rows = [line for line in text.splitlines() if "refused" in line]
    assert "2/2" in rows[0]
    assert "no such mailbox" in rows[0]
    assert "1/1" in rows[1]
    assert "550 5.1.1 <address> unknown" in text
    status, text, _ = run("--json")
    first, second = map(json.loads, text.splitlines())
    assert status == 1
    assert (first["open"], first["class"], first["state"], first["examples"]) == (
        2,
        "no such mailbox",
        "open",
        [ids[0]],
    )
    assert first["domains"] == {"a.test": 1, "b.test": 1}
    assert first["reply"] == "550 5.1.1 <ann@a.test> unknown"
    assert len(first["trend"]) == 24
    assert second["text"] == "full"
    for by, expected in (("domain", ["a.test", "b.test"]), ("recipient", ["ann@a.test", "bob@b.test", "cid@a.test"])):
        _, text, _ = run("--by", by, "--json")
        assert sorted(json.loads(line)["what"] for line in text.splitlines()) == expected
    _, text, _ = run("--by", "day", "--json")
    assert json.loads(text)["recipients"] == 3
    assert run("--kind", "deferred")[0] == 0
    assert run("--since", "1h", "--destination", "new", "--kind", "refused")[0] == 1


def test_one_reason(contents: Contents, new: Backup, run: Run) -> None:
    """The text as it came, both servers' words for examples, whom it concerns, what to do."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: refused("550 5.1.1 <ann@a.test>: no such user")})
    key = new.group().key
    status, text, _ = run("show", key)
    assert status == 0
    for part in ("550 5.1.1 <ann@a.test>: no such user", message_id, "accepted", "1  ann@a.test", "Create the mailbox"):
        assert part in text
    status, text, _ = run("show", key, "--json")
    shown = json.loads(text)
    example = shown["examples"][0]
    assert example["backup"] == "550 5.1.1 <ann@a.test>: no such user"
    (envelope,) = queries.envelopes(contents.connection, [message_id])
    assert envelope is not None
    assert (example["client"], example["size"], example["attempts"]) == ("", envelope.size, 1)
    assert example["received_at"] == pytest.approx(envelope.received_at, abs=0.01)
    assert shown["whom"] == [{"recipient": "ann@a.test", "count": 1}]


def test_acknowledging(contents: Contents, new: Backup, run: Run) -> None:
    """It is open no more, with who, why and until when; taken back, it is. Each is in the audit."""
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    key = new.group().key
    assert run("ack", key)[0] == 2  # without a reason
    assert run("ack", key, "--note", "known", "--for", "soon")[0] == 2
    status, text, _ = run("ack", key, "--note", "left the company", "--for", "5d")
    assert (status, text.startswith(key)) == (0, True)
    assert run()[0] == 0
    status, text, _ = run("--all")
    assert status == 0
    assert "acknowledged until" in text
    assert "left the company" in run("show", key)[1]
    assert run("unack", key, "--note", "he is back")[0] == 0
    assert run("unack", key)[0] == 1
    assert run()[0] == 1
    found = list(audit.acts(contents.connection))
    assert [(act.command, act.reason) for act in found] == [
        ("divergence unack", "he is back"), ("divergence ack", "left the company"),
    ]  # fmt: skip
    assert found[0].details["key"] == key


def test_acknowledging_for_one_domain(contents: Contents, new: Backup, run: Run) -> None:
    """A reason that another domain meets too stays open, and the command says so."""
    new.attempt(contents.pending("ann@a.test", "bob@b.test"), dict.fromkeys(range(2), refused()))
    status, text, _ = run("ack", new.group().key, "--note", "known", "--domain", "A.test")
    assert status == 0
    assert "b.test" in text
    assert run()[0] == 1


def test_retrying_a_reason(contents: Contents, new: Backup, run: Run) -> None:
    """Its failed copies are tried again, those of another reason are not."""
    ids = [contents.pending("ann@a.test") for _ in range(3)]
    for message_id, text in zip(ids, ("550 first", "550 first", "550 second"), strict=True):
        new.attempt(message_id, {0: refused(text)})
    status, text, _ = run("retry", new.groups()["first"].key, "--json")
    assert (status, json.loads(text)) == (0, {"retried": 2})
    jobs = {i: bytes(contents.connection.hget(keys.FAILURE + "new", i) or b"").partition(b"\n")[0] for i in ids}
    assert jobs[ids[0]] == jobs[ids[1]] != jobs[ids[2]]
    assert [act.command for act in audit.acts(contents.connection)] == ["divergence retry"]


def test_a_reason_of_several_destinations(contents: Contents, run: Run) -> None:
    """What holds the rest has the same key everywhere: the destination is asked for."""
    for name in ("new", "other"):
        backup = Backup(contents, name)
        for word in ("klm", "nop"):
            backup.attempt(contents.pending("ann@a.test", to=(name,)), {0: refused(f"550 {word}")}, most=1)
    status, _, error = run("show", "other")
    assert (status, "--destination" in error) == (2, True)
    assert run("show", "other", "--destination", "new")[0] == 0
    assert [group.destination for group in seen.find(contents.connection, "other")] == ["new", "other"]


def test_wrong_use(run: Run, new: Backup, contents: Contents) -> None:
    """A key that is none is a no; what cannot be meant is a misuse; a Redis that is away, no answer."""
    new.attempt(contents.pending("ann@a.test"), {0: deferred()})
    status, _, error = run("show", "0" * 12)
    assert (status, "--all" in error) == (1, True)
    assert run("show")[0] == 2
    assert run("--by", "colour")[0] == 2
    assert run("--since", "soon")[0] == 2
    assert run("--json", "show", new.group().key)[0] == 2  # it would say nothing
    assert run("--destination", "nobody")[0] == 1
    assert main.run(["divergence", "--redis", "redis://127.0.0.1:1"]) == 3


def test_what_comes_from_outside_moves_no_cursor(contents: Contents, new: Backup, run: Run) -> None:
    """Neither a reply nor an address nor a note writes a control character."""
    new.attempt(contents.pending("ann@a.test"), {0: refused("550 \x1b[2Jno")})
    key = new.group().key
    contents.connection.hset(f"{keys.DIVERGED}new:{key}", mapping={"reply": "\x1b[31m", "text": "\x1b]0;", "d:\x07": 1})
    run("ack", key, "--note", "\x1b[1m")
    for words in (("--all",), ("show", key), ("--all", "--by", "domain")):
        assert "\x1b" not in run(*words)[1]


def test_the_conditions_of_the_filter(contents: Contents, new: Backup, run: Run, tmp_path: Path) -> None:
    """By reply, code, domain and recipient as for copies; by the route that a recipient takes; the status is theirs."""
    for address, reply in (
        ("ann@shop.test", "550 5.1.1 <ann@shop.test> unknown"),
        ("bob@b.test", "552 5.2.2 Mailbox is full"),
        ("cid@moved.test", "554 5.7.1 Not from you"),
    ):
        new.attempt(contents.pending(address), {0: refused(reply)})
    (tmp_path / "people").write_text("cid@moved.test\n")
    (tmp_path / "settings.toml").write_text(f"""
        [relay]
        destination_primary = "old=127.0.0.1:9"
        [[backup]]
        name = "new"
        url = "127.0.0.2:9"
        [[route]]
        name = "shop"
        match = {{ recipients = ["@shop.test", "file:{tmp_path}/people"] }}
        primary = "old"
        backups = ["new"]
    """)

    def shown(*words: str) -> tuple[int, list[str]]:
        status, text, problem = run(*words, "--json", "--config", str(tmp_path / "settings.toml"))
        assert not problem
        return status, sorted(next(iter(json.loads(line)["domains"])) for line in text.splitlines())

    assert shown("--code", "5.2.2") == shown("--code", "552") == shown("--reply", "FULL") == (1, ["b.test"])
    assert shown("--code", "5xx", "--domain", "shop.test") == shown("--to", "ann@shop.test") == (1, ["shop.test"])
    assert shown("--recipient", "@b.test") == (1, ["b.test"])
    assert shown("--code", "4xx") == shown("--recipient", "x@shop.test") == (0, [])
    assert shown("--route", "shop") == (1, ["moved.test", "shop.test"])
    assert shown("--route", "default") == (1, ["b.test"])
    assert run("--code", "9")[0] == run("--recipient", "ann")[0] == 2
    settings = (tmp_path / "settings.toml").read_text()
    (tmp_path / "settings.toml").write_text(settings.replace("match = {", 'match = { clients = "10.0.0.0/8", '))
    assert run("--route", "chop", "--config", str(tmp_path / "settings.toml"))[0] == 2
    status, _, problem = run("--route", "shop", "--config", str(tmp_path / "settings.toml"))
    assert (status, "more than the recipient" in problem) == (2, True)
