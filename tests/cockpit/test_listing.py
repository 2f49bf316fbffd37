"""A sheet of a list: bounded in rows and in what it asks of Redis, and the next one begins where it ends."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from relay.cockpit import listing
from relay.ledger import keys
from support.ledger_contents import Contents
from workers.queues.selection import FAILED, WAITING, Filter, ListPlace, Which

COUNT = 3000


@pytest.fixture
def connection(redis_client: redis.Redis) -> redis.Redis:
    contents = Contents(redis_client, "new", "other")
    contents.many(COUNT, failed=True)
    contents.many(150, to="other", failed=True, replies=("554 5.7.1 spam",))
    contents.many(120)
    return redis_client


def asked(connection: redis.Redis) -> int:
    """Return how many commands Redis has done."""
    info: Any = connection.info("stats")
    return int(info["total_commands_processed"])


@pytest.mark.parametrize("which", [WAITING, FAILED])
def test_each_copy_is_on_one_sheet(connection: redis.Redis, which: Which) -> None:
    """Whatever many have the same time: a hundred on each but the last, in the order of the listings."""
    for key in (keys.FAILED + "new", keys.FAILED + "other"):
        names = connection.zrange(key, 0, 249)
        connection.zadd(key, dict.fromkeys(names, 1_700_000_000.0))
    found: list[tuple[str, str]] = []
    after: ListPlace | None = None
    while True:
        sheet = listing.sheet(connection, which, Filter(), after)
        assert len(sheet.rows) == listing.ROWS or sheet.next is None
        found += [(row.destination, row.id) for row in sheet.rows]
        after = sheet.next
        if after is None:
            break
    key = keys.FAILED if which is FAILED else keys.PENDING
    expected = [(name, i.decode()) for name in ("new", "other") for i in connection.zrange(key + name, 0, -1)]
    assert found == expected


def test_a_sheet_costs_the_same_however_long_the_list_is(connection: redis.Redis) -> None:
    """A hundred rows of thousands take a command for each, to read its envelope, and a few more."""
    before = asked(connection)
    sheet = listing.sheet(connection, FAILED, Filter())
    assert asked(connection) - before < listing.ROWS + 30
    assert (len(sheet.rows), sheet.total) == (listing.ROWS, COUNT + 150)
    assert sheet.looked_at <= 2 * listing.ROWS


def test_a_sheet_ends_where_it_has_looked_at_many(connection: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where next to nothing passes, the next sheet goes on behind what was looked at."""
    monkeypatch.setattr(listing, "_LOOKED", 1000)
    chosen = Filter(recipient="r2999@d99.test")
    sheet = listing.sheet(connection, FAILED, chosen)
    looked = 0
    while not sheet.rows and sheet.next:
        looked += sheet.looked_at
        sheet = listing.sheet(connection, FAILED, chosen, sheet.next)
    assert [row.recipients for row in sheet.rows] == [("r2999@d99.test",)]
    rest = listing.sheet(connection, FAILED, Filter(code="554"))
    assert {row.destination for row in rest.rows} <= {"other"}


def test_a_limit_is_the_last_sheet(connection: redis.Redis) -> None:
    """Who asks for so many gets no next sheet."""
    sheet = listing.sheet(connection, FAILED, Filter(limit=7))
    assert (len(sheet.rows), sheet.next) == (7, None)
