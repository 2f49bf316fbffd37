"""The reconciler keeps divergence true: what is given up is counted, wrong numbers are mended, old reasons go."""

from __future__ import annotations

import pytest
import redis

from relay.ledger import changes, keys
from support.diverged_copies import Backup, deferred, refused
from support.ledger_contents import Contents, settings
from workers.upkeep import reconciler
from workers.upkeep.sweep import Sweeper

DAY = 86400.0


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new")


@pytest.fixture
def new(contents: Contents) -> Backup:
    return Backup(contents)


def test_what_is_given_up_in_an_outage_is_counted(contents: Contents, new: Backup) -> None:
    """The primary has it, the backup never took it: a reason in words of ours; what it was put off for is over."""
    ids = [contents.pending("ann@a.test", "bob@b.test", age=6 * DAY) for _ in range(2)]
    new.attempt(ids[0], {0: deferred("450 4.2.0 greylisted"), 1: deferred("450 4.2.0 greylisted")})
    contents.pause(reason="connection refused")
    found = Sweeper(contents.connection, settings()).sweep()
    assert found.counts["given up"] == 2
    groups = {group.kind: group for group in new.groups().values()}
    assert (groups["given-up"].open, groups["given-up"].messages, groups["given-up"].own) == (4, 2, True)
    assert groups["deferred"].open == 0
    assert reconciler.verify(contents.connection, settings(), 0).counts["wrong count of refusals"] == 0


def test_verify_mends_a_wrong_number(contents: Contents, new: Backup) -> None:
    """And says so; a dry run only says it."""
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    place = f"{keys.DIVERGED}new:{new.group().key}"
    contents.connection.hset(place, "open", 7)
    dry = reconciler.verify(contents.connection, settings(), 0, repair=False)
    assert [finding.action for finding in dry.findings] == ["7 recipients, should be 1"]
    assert new.group().open == 7
    done = reconciler.verify(contents.connection, settings(), 0)
    assert [finding.action for finding in done.findings] == ["7 recipients, mended to 1"]
    assert done.disagreed
    assert new.group().open == 1
    assert not reconciler.verify(contents.connection, settings(), 0).disagreed


def test_a_lost_reason_comes_back(contents: Contents, new: Backup) -> None:
    """A failover that lost the group and kept the copies."""
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    before = new.group()
    contents.connection.delete(*contents.connection.keys("smtpdup:div*"))
    reconciler.verify(contents.connection, settings(smtp_domain="relay.test"), 0)
    assert (new.group().key, new.group().text, new.group().open) == (before.key, before.text, 1)


def test_an_old_reason_is_forgotten(contents: Contents, new: Backup) -> None:
    """After divergence.keep without an open recipient: the ordinary work of a sweep."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: deferred()})
    new.attempt(message_id, {})
    place = f"{keys.DIVERGED}new:{new.group().key}"
    contents.connection.hset(place, "last", changes.now(contents.connection) - 2 * DAY)
    sweeper = Sweeper(contents.connection, settings(divergence_keep="1d"))
    report = sweeper.sweep()
    assert report.counts["reason for refusals"] == 1
    assert not report.disagreed
    assert new.groups() == {}
