"""Words that change many copies: what they show first, the question, the number that is typed, Ctrl-C, the audit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay.cockpit import bulk_preview
from relay.command import filters
from relay.command.exit_status import Misuse
from relay.command.main import run
from relay.ledger import audit, keys
from support.ledger_contents import Contents
from support.product import Product
from support.redis_servers import RedisServer
from support.terminal import typed
from workers.queues import failed

REPLIES = ("550 5.1.1 <{n}@d.test> no such mailbox", "452 4.2.2 mailbox {n} is full", "554 5.7.1 spam")


@pytest.fixture
def site(product: Callable[..., Product], redis_factory: Callable[..., RedisServer]) -> Product:
    """A product that is not running, with a Redis of its own."""
    return product(start=False, redis_url=redis_factory().url)


@pytest.fixture
def contents(site: Product) -> Iterator[Contents]:
    with redis.Redis.from_url(site.redis_url) as client:
        yield Contents(client)


def acts(contents: Contents) -> list[audit.Act]:
    return list(audit.acts(contents.connection))


# Reading


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("sender", "nobody"), ("recipient", ""), ("domain", ""), ("domain", "a@b.test"), ("client", "10.1.2.3/8"),
        ("client", ""), ("reply", " "), ("code", "five"), ("group", ""), ("attempts", "many"), ("older", "soon"),
        ("newer", "0"), ("larger", "-1"), ("limit", "0"), ("limit", ""),
    ],
)  # fmt: skip
def test_a_condition_that_cannot_be_meant(flag: str, value: str) -> None:
    """It is refused by its name, above all an empty one, as of a variable that a script has not set."""
    with pytest.raises(Misuse, match=f"^--{flag}: expected"):
        filters.read({flag: [value]})


def test_a_condition_that_is_there_twice_is_refused() -> None:
    """Neither "or" nor "the last one wins" can be guessed."""
    with pytest.raises(Misuse, match="--code: given 2 times"):
        filters.read({"code": ["550", "551"]})


@pytest.mark.parametrize("word", ["queue drop", "failed drop", "failed retry", "failed export"])
@pytest.mark.parametrize("rest", [[], ["--limit", "5"], ["0" * 16, "--all"]], ids=" ".join)
def test_changing_words_want_a_condition(
    word: str, rest: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at all, or a limit alone, is not taken for everything; ids and --all contradict each other."""
    monkeypatch.chdir(tmp_path)
    assert run([*word.split(), *rest]) == 2
    assert capsys.readouterr().err.startswith("smtp-dup: ")


def test_a_reason_is_a_reply_without_its_own_words() -> None:
    """Refusals that differ in addresses and numbers are one reason."""
    assert bulk_preview.reason_of("550 5.1.1 <a@b.test>: no such user") == bulk_preview.reason_of(
        "550 5.1.1 <c@d.test>: no such user"
    )
    assert bulk_preview.reason_of("550 5.1.1 <a@b.test>: no such user").startswith("550 5.1.1 ")
    assert bulk_preview.reason_of("connection refused") == "connection refused"


# What would be done


def test_a_dry_run_says_how_many_how_large_and_why(site: Product, contents: Contents) -> None:
    """Count, octets, the reasons by their frequency, five examples; nothing has changed, nobody is asked."""
    contents.many(300, failed=True, replies=REPLIES)
    (found,) = site.json("failed", "drop", "--domain", "d7.test", "--code", "5xx", "--dry-run")
    assert (found["would_drop"], found["bytes"]) == (2, 8)
    (found,) = site.json("failed", "drop", "--all", "--dry-run")
    assert found["would_drop"] == 300
    assert {row["copies"] for row in found["reasons"]} == {100}
    assert sorted(row["reason"][:9] for row in found["reasons"]) == ["452 4.2.2", "550 5.1.1", "554 5.7.1"]
    assert [len(row["id"]) for row in found["examples"]] == [16] * 5
    text = site.run("failed", "drop", "--all", "--dry-run").stdout
    assert text.startswith("300 copies would be dropped, 1200 bytes.\n")
    assert "     100  554 5.7.1 spam\n" in text
    assert "  and 295 more\n" in text
    assert contents.connection.zcard(keys.FAILED + "new") == 300
    assert acts(contents) == []


def test_listings_take_the_same_conditions(site: Product, contents: Contents) -> None:
    """`queue list` and `failed list` show what a dry run counts."""
    contents.many(200, failed=True, replies=REPLIES)
    contents.many(200)
    for conditions in (
        ["--domain", "d7.test"],
        ["--from", "@n3.test", "--limit", "4"],
        ["--newer", "1h"],
    ):
        for room in ("queue", "failed"):
            listed = site.json(room, "list", *conditions)
            (counted,) = site.json(room, "drop", *conditions, "--dry-run")
            assert len(listed) == counted["would_drop"] > 0
    assert site.run("failed", "list", "--domain", "nobody.test").stdout == "Nothing that failed is like that.\n"


# The question


def test_above_a_hundred_the_number_is_typed(site: Product, contents: Contents) -> None:
    """A y, another number or nothing changes nothing; the very number does. What is asked is what a dry run says."""
    contents.many(101, failed=True, replies=REPLIES)
    for answer in ("y\n", "yes\n", "100\n", "\n"):
        seen = typed(site, "failed", "drop", "--all", answer=answer, columns=200)
        assert seen.status == 1
        assert "Drop 101 copies that failed, for good? Type the number: " in seen.text
        assert "554 5.7.1 spam" in seen.text
    assert len(contents.failed_ids()) == 101
    assert typed(site, "failed", "drop", "--all", answer="101\n").status == 0
    assert contents.failed_ids() == []
    (act,) = acts(contents)
    assert (act.command, act.after, act.details) == ("failed drop", "101 dropped of new", {"filter": "--all"})


def test_up_to_a_hundred_a_letter_is_enough(site: Product, contents: Contents) -> None:
    """y drops, anything else does not."""
    contents.many(100)
    assert typed(site, "queue", "drop", "--all", answer="100\n").status == 1
    assert typed(site, "queue", "drop", "--all", answer="y\n").status == 0
    assert contents.pending_ids() == []


def test_without_a_terminal_it_must_have_been_said(site: Product, contents: Contents) -> None:
    """Status 2 and one line, before anything is looked at; what loses nothing goes on without."""
    contents.many(3, failed=True)
    done = site.run("failed", "drop", "--code", "550", input="3\n")
    assert (done.returncode, done.stderr) == (2, "smtp-dup: nobody to ask: say --yes\n")
    assert site.json("failed", "retry", "--code", "451") == [{"retried": 0}]
    assert site.json("failed", "retry", "--code", "550") == [{"retried": 3}]
    assert site.json("queue", "flush", "--domain", "d1.test") == [{"flushed": 0}]


# Many


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_many_failed_copies(site: Product, contents: Contents, count: int) -> None:
    """Those of one domain and one reason go, within a time in which somebody waits; an id among them at once."""
    contents.many(count, failed=True, replies=REPLIES)
    theirs = count // 300
    found = site.json("failed", "drop", "--domain", "d7.test", "--code", "550", "--yes")
    assert found == [{"dropped": theirs}]
    assert contents.connection.zcard(keys.FAILED + "new") == count - theirs
    left = site.json("failed", "list", "--domain", "d7.test", "--limit", "1000")
    assert {row["reply"][:3] for row in left} == {"452", "554"}
    (first,) = site.json("failed", "list", "--limit", "1")
    assert site.json("failed", "drop", first["id"], "--yes") == [{"dropped": 1}]
    assert [act.after for act in acts(contents)] == ["1 dropped of new", f"{theirs} dropped of new"]
    assert acts(contents)[1].details == {"filter": "--domain d7.test --code 550"}


@pytest.mark.parametrize("room", ["queue", "failed"])
def test_ctrl_c_stops_between_two_pages(site: Product, contents: Contents, room: str) -> None:
    """Status 130; what it says was done and left is what was done and is left, there and in the audit."""
    contents.many(20_000, failed=room == "failed")
    key = (keys.FAILED if room == "failed" else keys.PENDING) + "new"
    seen = typed(site, room, "drop", "--all", "--yes", columns=200, interrupt_at=r"[1-9]\d*/20000")
    assert seen.status == 130, seen.text
    dropped, left = (int(re.search(p, seen.text)[1]) for p in (r"(\d+) cop\w+ dropped", r"Stopped: (\d+) cop"))
    assert contents.connection.zcard(key) == left == 20_000 - dropped
    assert 0 < left < 20_000
    (act,) = acts(contents)
    assert act.after == f"{dropped} dropped of new, {left} not come to"


def test_ctrl_c_while_it_looks_changes_nothing(site: Product, contents: Contents) -> None:
    """The first look, before the question, may take long: it can be ended as well."""
    contents.many(20_000)
    seen = typed(site, "queue", "drop", "--sender", "@n1.test", columns=200, interrupt_at="looking")
    assert seen.status == 130
    assert "nothing was changed" in seen.text
    assert contents.connection.zcard(keys.PENDING + "new") == 20_000
    assert acts(contents) == []


def test_a_redis_that_goes_away_in_the_middle(
    site: Product, contents: Contents, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was done until then is told, and the status is 3."""
    contents.many(3000, failed=True)
    drop = failed.drop_copies
    calls = iter(range(9))

    def drop_once(connection: redis.Redis, *arguments: object) -> int:
        if next(calls):
            raise redis.ConnectionError("connection reset")
        return drop(connection, *arguments)

    monkeypatch.setattr(failed, "drop_copies", drop_once)
    monkeypatch.chdir(site.directory)
    assert run(["failed", "drop", "--all", "--yes", "--redis-url", site.redis_url]) == 3
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Broken off: 1000 copies dropped at least, 2000 not come to."
    assert len(contents.failed_ids()) == 2000


# Export


def test_many_are_exported_into_a_folder(site: Product, contents: Contents, tmp_path: Path) -> None:
    """A file each, nobody else's to read, never written over; a second run writes what is missing."""
    ids = [contents.failed() for _ in range(3)]
    waiting = contents.pending()
    folder = tmp_path / "out" / "eml"
    assert site.json("failed", "export", "--all", str(folder)) == [{"exported": 3}]
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{i}.eml" for i in ids)
    file = folder / f"{ids[0]}.eml"
    assert b"\r\n.dots\r\n" in file.read_bytes()
    assert (file.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    file.write_text("mine")
    (folder / f"{ids[1]}.eml").unlink()
    assert site.json("failed", "export", "--code", "550", str(folder)) == [{"exported": 1, "skipped": 2}]
    assert file.read_text() == "mine"
    assert site.json("failed", "export", ids[2], ids[0], str(tmp_path / "two")) == [{"exported": 2}]
    assert not (folder / f"{waiting}.eml").exists()
    assert acts(contents)[0].details["filter"].startswith(f"{ids[2]} {ids[0]} into ")


def test_an_export_names_what_it_cannot_write(site: Product, contents: Contents, tmp_path: Path) -> None:
    """A damaged record is told by its id, the others are written, the status is 1; without a folder it is 2."""
    good, bad = contents.failed(), contents.failed()
    record = bytearray(contents.connection.get(keys.MESSAGE + bad) or b"")
    record[-3] ^= 1
    contents.connection.set(keys.MESSAGE + bad, bytes(record))
    done = site.run("failed", "export", "--all", str(tmp_path / "out"))
    assert done.returncode == 1
    assert bad in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{good}.eml"]
    assert site.run("failed", "export", "--all").returncode == 2
    assert site.run("failed", "export", good, bad).returncode == 2
    assert json.loads(site.run("failed", "export", "--all", "--dry-run", "--json").stdout)["would_export"] == 2
