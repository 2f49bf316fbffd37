"""Look-up: by each word of a message, over files of many hours, with what is damaged named and the rest answered."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay.config.model import TraceSettings
from relay.mail.reply import Reply
from relay.trace import events, files, privacy
from relay.trace.lookup import Unseen
from relay.trace.search_terms import NoWord
from support.traced import Traced, delivered

HOUR = 3600


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    found = Traced(tmp_path)
    yield found
    found.close()


@pytest.mark.parametrize(
    "word",
    [
        "{id}", "<1@a.example>", "1@a.example", "alice@a.example", "ALICE@A.example", "Bob@b.example", "@a.example",
        "@B.EXAMPLE", "from:alice@a.example", "to:bob@b.example", "to:@b.example", "from:a.example",
        "4XyzAB12", "NEW77abc", "from:<alice@a.example>",
    ],
)  # fmt: skip
def test_a_message_is_found_by_each_of_its_words(traced: Traced, word: str) -> None:
    """Its id, Message-ID, sender, recipient, their domains, and the queue id that either server gave."""
    mine, other = traced.received(), traced.received("carol@c.example", ["dave@d.example"], message_id="<2@c.example>",
                                                      reply=Reply.of(250, "2.0.0 Ok: queued as 999ZZZ"))  # fmt: skip
    traced.write(mine, other, delivered(mine[1]))
    (life,) = traced.find(word.format(id=mine[1]))
    assert life.id == mine[1]
    assert life.status == "delivered"
    assert life.primary_reply == "250 2.0.0 Ok: queued as 4XyzAB12"
    assert [(copy.destination, copy.reply) for copy in life.copies] == [("new", "250 2.0.0 Ok: queued as NEW77abc")]


@pytest.mark.parametrize("word", ["to:alice@a.example", "from:bob@b.example", "@example", "1", "carol@c.example"])
def test_what_is_not_meant_is_not_found(traced: Traced, word: str) -> None:
    """A sender is no recipient, a part of a word no word."""
    traced.write(traced.received())
    assert traced.find(word) == []


@pytest.mark.parametrize("word", ["", "from:", "to:", "@", "x" * 1001])
def test_what_is_no_word_is_said_to_be_none(word: str, traced: Traced) -> None:
    """Not silently everything."""
    with pytest.raises(NoWord):
        traced.find(word)


def test_words_of_one_role_are_alternatives_of_two_both_hold(traced: Traced) -> None:
    """from: narrows to:, two ids are two messages."""
    first = traced.received()
    second = traced.received("carol@c.example", ["bob@b.example"])
    third = traced.received("alice@a.example", ["erin@e.example"])
    traced.write(first, second, third)
    assert [life.id for life in traced.find("from:carol@c.example", "to:bob@b.example")] == [second[1]]
    assert {life.id for life in traced.find(first[1], third[1])} == {first[1], third[1]}
    assert {life.id for life in traced.find("@b.example")} == {first[1], second[1]}
    assert [life.id for life in traced.find(first[1], "to:erin@e.example")] == []


def test_a_life_goes_over_hours(traced: Traced) -> None:
    """Received in one hour, delivered in another: one message, its steps in order."""
    mine = traced.received()
    traced.write(mine)
    deferred = events.tried(
        mine[1], "new", 1, None, [(events.DEFERRED, 1, ["bob@b.example"], Reply.of(451, "later"))], 60
    )
    traced.write(deferred)
    traced.now += 3 * HOUR
    traced.write(delivered(mine[1], attempt=2))
    (life,) = traced.find("bob@b.example")
    assert [type(event).__name__ for event in life.events] == ["Received", "Tried", "Tried"]
    assert life.status == "delivered"
    assert [step.who for step in life.timeline()][-2:] == ["new", "new"]
    assert len(files.listed(traced.folder)) == 2


def test_the_newest_come_first_and_no_more_than_asked_for(traced: Traced) -> None:
    """Over hours too; --since and --until leave out the others."""
    wires = []
    for n in range(30):
        traced.now += HOUR / 4
        wires.append(traced.received(message_id=f"<{n}@a.example>"))
        traced.write(wires[-1])
    ids = [wire[1] for wire in wires][::-1]
    assert [life.id for life in traced.find("bob@b.example", limit=7)] == ids[:7]
    assert [life.id for life in traced.find("bob@b.example", limit=100)] == ids
    assert [life.id for life in traced.find(limit=3)] == ids[:3]
    since, until = wires[10][2] / 1000 - 1, wires[12][2] / 1000 + 1
    assert [life.id for life in traced.find("@b.example", since=since, until=until)] == ids[17:20]


def test_by_status(traced: Traced) -> None:
    """Refused by the primary, failed at a backup, lost, waiting, delivered."""
    wires = {
        name: traced.received(message_id=f"<{name}@a.example>") for name in ("delivered", "waiting", "failed", "lost")
    }
    wires["refused"] = traced.received(
        outcome=events.REFUSED, reply=Reply.of(550, "5.7.1 spam"), stage="", copies=["new"]
    )
    traced.write(*wires.values())
    traced.write(
        delivered(wires["delivered"][1]),
        events.tried(wires["failed"][1], "new", 1, 0.1, [(events.FAILED, 1, ["bob@b.example"], Reply.of(550, "no"))]),
        events.noted(wires["lost"][1], traced.now, "copy lost", "", "disk full"),
    )
    for name, wire in wires.items():
        assert [life.id for life in traced.find("bob@b.example", status=name)] == [wire[1]], name
        assert [life.id for life in traced.find(status=name)] == [wire[1]], name


def test_a_damaged_file_is_named_and_the_others_are_answered(traced: Traced) -> None:
    """An old one is set aside, with its name; a file that is none of ours stays."""
    old = traced.received()
    traced.write(old)
    traced.now += HOUR
    traced.write(traced.received())
    traced.now += HOUR
    damaged = files.named(traced.folder, traced.now - 10 * HOUR, "up", 1)
    damaged.path.write_bytes(b"SQLite format 3\0" + b"x" * 8192)
    (traced.folder / "notes.txt").write_text("mine")
    unseen = Unseen()
    assert len(traced.find("bob@b.example", unseen=unseen)) == 2
    assert len(unseen.damaged) == 1
    assert damaged.path.name in unseen.damaged[0]
    assert not damaged.path.exists()
    assert (traced.folder / files.CORRUPT / damaged.path.name).exists()
    assert (traced.folder / "notes.txt").exists()
    unseen = Unseen()
    assert len(traced.find("bob@b.example", unseen=unseen)) == 2
    assert unseen.damaged == []


def test_what_a_file_says_is_not_trusted(traced: Traced) -> None:
    """Rows that make no sense are left out."""
    mine = traced.received()
    traced.write(mine)
    (file,) = files.listed(traced.folder)
    with closing(sqlite3.connect(file.path)) as connection, connection:
        row = connection.execute("SELECT data FROM rows").fetchone()[0].decode()
        odd = [b"", b"{", b"[]", b"[[]]", b"[1]", b"null", b'[["m"]]', b'[["m",1,2]]', b"[" * 100_000, b"\xff",
               row.replace('"accepted"', '"other"').encode(), row.replace("18000", "1e999").encode(),
               row.replace('"new"', '"../../x"').encode()]  # fmt: skip
        connection.executemany("INSERT INTO rows (data) VALUES (?)", [(one,) for one in odd])
        connection.execute("INSERT INTO rows (data) VALUES (7)")
    (life,) = traced.find()
    assert life.id == mine[1]


@pytest.mark.parametrize("mode", ["hashed", "off"])
def test_addresses_are_kept_as_it_is_set(tmp_path: Path, mode: str) -> None:
    """Hashed: an exact search works and the domains are shown; off: only ids find it. No file has an address."""
    traced = Traced(tmp_path, TraceSettings(addresses=mode))
    said = Reply.of(550, "5.1.1 <bobby@b.example>: user bobby unknown")
    mine = traced.received("alice@a.example", ["bobby@b.example"], refused=[("zoe@b.example", said, False)])
    traced.write(mine)
    traced.write(events.tried(mine[1], "new", 1, 0.1, [(events.FAILED, 1, ["bobby@b.example"], said)]))
    assert len(traced.find(mine[1])) == 1
    assert len(traced.find("<1@a.example>")) == 1
    hashed = mode == "hashed"
    for word in ("bobby@b.example", "BOBBY@b.example", "to:bobby@b.example", "from:alice@a.example", "zoe@b.example"):
        assert len(traced.find(word)) == hashed, word
    assert len(traced.find("@b.example")) == hashed
    (life,) = traced.find(mine[1])
    assert life.recipients == (("*@b.example",) if hashed else ())
    shown = " ".join(step.text for step in life.timeline())
    traced.close()
    content = b"".join(file.path.read_bytes() for file in files.listed(traced.folder))
    for name in ("bobby", "alice", "zoe"):
        assert name not in shown
        assert name.encode() not in content
    assert (traced.folder / privacy.KEY_FILE).exists() == hashed
