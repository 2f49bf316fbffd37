"""Divergence as readiness and the command see it: what stands open, of which kind, and what was noise."""

from __future__ import annotations

import pytest
import redis

from relay.cockpit import divergence as seen
from relay.cockpit import divergence_details
from relay.ledger import changes, divergence, divergence_upkeep, keys
from relay.ledger.divergence import DEFERRED, GIVEN_UP, NOISE, REFUSED
from support.diverged_copies import Backup, deferred, given_up, refused
from support.ledger_contents import Contents


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new", "other")


@pytest.fixture
def new(contents: Contents) -> Backup:
    return Backup(contents)


def test_nothing_is_nothing(contents: Contents) -> None:
    """A backup that took all has no group."""
    found = seen.standing(contents.connection, "new")
    assert (found.open, found.acknowledged, found.deferred) == ((), 0, 0)


def test_what_stands_open(contents: Contents, new: Backup) -> None:
    """Recipients by kind; the acknowledged ones apart; noise beside what was taken."""
    connection = contents.connection
    for text in ("550 first", "550 second"):
        new.attempt(contents.pending("ann@a.test", "bob@b.test"), dict.fromkeys(range(2), refused(text)))
    new.attempt(contents.pending("cid@a.test"), {0: refused("550 first")})
    new.attempt(contents.pending("ann@a.test"), {0: given_up()})
    new.attempt(contents.pending("ann@a.test"), {0: deferred()})
    noisy = contents.pending("ann@a.test")
    new.attempt(noisy, {0: deferred("450 greylisted")})
    new.attempt(noisy, {})
    divergence_upkeep.acknowledge(connection, new.groups()["second"], "alice", "known", 600)
    divergence.cover(connection, "new", {"a.test": [40, 1, 1], "b.test": [0, 0, 2]})
    divergence.outage_begins(connection, "new", changes.now(connection) - 60, "refused")
    found = seen.standing(connection, "new")
    assert [group.open for group in found.open] == [3, 1, 1]
    assert {(group.kind, group.text, group.open) for group in found.open} == {
        (REFUSED, "first", 3),
        (GIVEN_UP, "later", 1),
        (DEFERRED, "later", 1),
    }
    assert (found.acknowledged, found.deferred) == (1, 1)
    assert (found.noise, found.taken) == (1, 40)
    assert [outage.end for outage in found.outages] == [0.0]


def test_groups_are_chosen(contents: Contents, new: Backup) -> None:
    """Open ones, or all; of one kind, one destination, or seen lately."""
    connection = contents.connection
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    Backup(contents, "other").attempt(contents.pending("ann@a.test", to=("other",)), {0: refused("550 elsewhere")})
    noisy = contents.pending("ann@a.test")
    new.attempt(noisy, {0: deferred()})
    new.attempt(noisy, {})

    def texts(*arguments: str, **options: object) -> list[str]:
        return [group.text for group in seen.chosen(connection, *arguments, **options)]

    assert sorted(texts()) == ["elsewhere", "no such user"]
    assert texts("other") == ["elsewhere"]
    assert texts("new", everything=True) == ["no such user", "later"]
    assert texts(kind=NOISE) == ["later"]
    assert texts(kind=DEFERRED) == []
    assert texts(kind=REFUSED, since=changes.now(connection) + 1) == []


def test_recipients_are_added_up(contents: Contents, new: Backup) -> None:
    """By domain, by address, by day, over groups."""
    new.attempt(contents.pending("ann@a.test", "bob@b.test"), dict.fromkeys(range(2), refused("550 first")))
    new.attempt(contents.pending("ann@a.test"), {0: refused("550 second")})
    groups = seen.chosen(contents.connection)
    assert seen.by_domain(groups) == [seen.Sum("a.test", "new", 2, 2), seen.Sum("b.test", "new", 1, 1)]
    assert seen.by_recipient(contents.connection, groups) == [
        seen.Sum("ann@a.test", "new", 2, 2), seen.Sum("bob@b.test", "new", 1, 1),
    ]  # fmt: skip
    assert [(day.recipients, day.groups) for day in seen.by_day(groups)] == [(3, 2)]


def test_the_failed_copies_of_a_group(contents: Contents, new: Backup) -> None:
    """Those that are open in it, also in the one that holds the rest; a copy elsewhere is none."""
    connection = contents.connection
    words = ["klm", "lmn", "mno", "nop"]
    ids = [contents.pending("ann@a.test") for _ in words]
    for word, message_id in zip(words, ids, strict=True):
        new.attempt(message_id, {0: refused(f"550 {word}")}, most=2)
    groups = new.groups()
    assert seen.failed_copies(connection, groups["klm"]) == [ids[0]]
    (rest,) = seen.find(connection, "other")
    assert seen.failed_copies(connection, rest) == sorted(ids[2:])
    assert seen.find(connection, "0" * 12) == []
    assert seen.find(connection, keys.FAILED) == []
    (example,) = divergence_details.examples(connection, groups["klm"], 5)
    assert (example.id, example.recipients, example.stands) == (ids[0], ("ann@a.test",), "failed")
    assert (example.primary, example.backup) == ("accepted", "550 klm")
    assert example.origin(changes.now(connection)).endswith(" old, 1 attempt")
