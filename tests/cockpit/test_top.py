"""A frame of `top` fits its screen whatever is in it, and is read without a scan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import redis

from relay.cockpit import top
from relay.cockpit.readiness import Verdict
from relay.cockpit.top import SORTS, Frame, Look, RouteRate, ServerNow, lines
from relay.ledger import changes, events, flow, keys
from relay.ledger.events import Event
from relay.ledger.hosts import Host
from support.ledger_contents import Contents, settings

AT = 1_795_796_640.0


def row(name: str, **values: Any) -> ServerNow:
    given: dict[str, Any] = {
        "is_primary": False, "in_rate": 12.34, "out_rate": 0.0, "pending": 0, "oldest_s": 0.0, "p95_s": 0.12,
        "deferred": 0, "failed": 0, "state": "ok", "reason": "", "trend": (0, 1, 8) * 10, **values,
    }  # fmt: skip
    return ServerNow(name, **given)


def frame(rows: Sequence[ServerNow], *, told: int = 10, hosts: int = 1, **values: Any) -> Frame:
    return Frame(
        AT, 3, "old", [Verdict("new", "old", AT, ())], [row("old", is_primary=True, state="primary"), *rows],
        [Event(AT - n, "a", "failed", f"550 {n} " + "x" * 180) for n in range(told)],
        [Host(f"host {n}", f"host{n}", "up", 3, 0, 0.0, 1.0) for n in range(hosts)], [], **values,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 24), (20, 5), (200, 60), (80, 1)])
@pytest.mark.parametrize(("backups", "told", "hosts"), [(1, 10, 1), (3, 10, 2), (40, 100, 40), (0, 0, 0)])
def test_a_frame_fits_the_screen(width: int, height: int, backups: int, told: int, hosts: int) -> None:
    """No line is longer and none is more than there is room for."""
    full = frame([row("b" * 40 + str(n), reason="timed out " * 30) for n in range(backups)], told=told, hosts=hosts)
    shown = lines(full, Look(width, height))
    assert len(shown) <= height
    assert max(map(len, shown)) <= width


def test_a_screen_of_80_by_24_has_it_all() -> None:
    """Head, verdict, two backups, a host and the ten events."""
    shown = lines(frame([row("new"), row("third", pending=7, oldest_s=840.0)]), Look(80, 24))
    text = "\n".join(shown)
    for part in ("primary old", "epoch 3", "new: READY", "pending", "14m", "host0", "550 9"):
        assert part in text, part


def test_routes_have_a_line_each() -> None:
    """With what each server takes, and who is away; where there are none, nothing is said of them."""
    known = [RouteRate("shop", "a", 3.25), RouteRate("shop", "b", 0.0, ("vm/1",)), RouteRate("pilot", "new", 120.0)]
    shown = lines(frame([row("new")], routes=known), Look(80, 40))
    assert "shop: a 3.2/s, b 0.0/s AWAY" in shown
    assert "pilot: new 120/s" in shown
    assert frame([], routes=known).as_object()["routes"][1] == {
        "route": "shop", "server": "b", "rate": 0.0, "away": ("vm/1",),
    }  # fmt: skip
    assert not any("/s" in line for line in lines(frame([row("new")]), Look(80, 40))[4:] if ": " in line)


def test_no_letter_is_lost_where_there_is_no_screen() -> None:
    """One frame for a file or a pipe."""
    shown = lines(frame([row("b" * 40, reason="timed out " * 30)], told=10), Look(80, 24, screen=False))
    assert sum("x" * 180 in line for line in shown) == 10
    assert any("timed out " * 29 in line for line in shown)


def test_sorting_and_one_server() -> None:
    """The primary stays first; the others by the number asked for; one alone with its verdict."""
    full = frame([row("a", pending=1), row("b", pending=9), row("c", failed=3)], told=0)

    def names(**how: Any) -> list[str]:
        found = [line.partition(" ")[0] for line in lines(full, Look(120, 60, **how))]
        return [name for name in found if name in {"old", "a", "b", "c"}]

    assert names() == ["old", "a", "b", "c"]
    assert names(sort="pending") == ["old", "b", "a", "c"]
    assert names(sort="failed") == ["old", "c", "a", "b"]
    assert names(only="b") == ["old", "b"]
    assert all(lines(full, Look(sort=sort)) for sort in SORTS)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_terminal_can_write_it(encoding: str) -> None:
    """Bars are ASCII where the terminal has no others."""
    "\n".join(lines(frame([row("new")]), Look(encoding=encoding))).encode(encoding)


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_it_is_read_from_the_flow_and_the_ledger(connection: redis.Redis) -> None:
    """Rates of the last half minute, trend, p95; what waits and what failed as the ledger counts it."""
    contents = Contents(connection, "new")
    contents.pending("a@b.example")
    now = changes.now(connection)
    sums = {"accepted": 60, "copied new": 60, "delivered new": 30, "seconds 0.1 new": 30}
    flow.add(connection, "me", b"", sums, {}, now - 12)
    events.add(connection, "a", [(now, "failed", {"reply": "550 no", "id": "x"})], is_sealed=False)
    found = top.look(connection, settings(relay_destination_backups="new=localhost:2526"))
    primary, new = found.rows
    assert (primary.in_rate, new.in_rate, new.out_rate, new.pending) == (2.0, 2.0, 1.0, 1)
    assert sum(new.trend) == 30
    assert new.p95_s == pytest.approx(0.095)
    assert [event.text for event in found.events] == ["550 no id=x"]
    json.dumps(found.as_object())


def test_what_several_primaries_took_has_the_name_of_none(connection: redis.Redis) -> None:
    """With routes, or while somebody has moved, the first row is of all who answered; their own are below."""
    now = changes.now(connection)
    sums = {"accepted": 90, "accepted default old": 60, "accepted shop a": 30}
    given = settings(relay_destination_primary="old=localhost:25")
    flow.add(connection, "me", b"", {"accepted": 3}, {}, now - 12)
    assert top.look(connection, given).rows[0].name == "old"
    flow.add(connection, "me", b"", sums, {}, now - 12)
    found = top.look(connection, given)
    assert (found.rows[0].name, found.rows[0].out_rate, found.primary) == ("primaries", 3.1, "old")
    assert found.rows[0].is_all_primaries
    shown = lines(found, Look(80, 40))
    assert any(line.startswith("primaries") for line in shown)
    assert not any(line.startswith("old ") for line in shown)
    assert {"default: old 2.0/s", "shop: a 1.0/s"} <= set(shown)


def test_a_former_backup_is_there_while_something_waits_for_it(connection: redis.Redis) -> None:
    """And is not when nothing does."""
    contents = Contents(connection, "gone", "empty", "new")
    contents.pending("a@b.example", to=("gone",))
    found = top.look(connection, settings(relay_destination_backups="new=localhost:2526"))
    assert [r.name for r in found.rows] == ["localhost:25", "gone", "new"]


@pytest.mark.parametrize("junk", [b"", b"\xff", b"[1]", b'["x", "a", "b", "c"]', b"[" * 9999, b'[1e999,"a","b","c"]'])
def test_what_is_no_event_is_left_out(connection: redis.Redis, junk: bytes) -> None:
    """Whoever can write to Redis can write anything there."""
    connection.lpush(keys.EVENTS, junk, json.dumps([1.0, "a", "failed\x1b[2J", "z" * 9999]))
    (found,) = events.read(connection)
    assert (found.event, len(found.text)) == ("failed\\x1b[2J", 200)
    connection.delete(keys.EVENTS)
    connection.set(keys.EVENTS, junk)
    assert events.read(connection) == []


def test_where_mail_is_sealed_an_event_names_nobody(connection: redis.Redis) -> None:
    """No address and no word of a server stands in Redis in the clear."""
    fields = {"id": "x", "sender": "<a@b.example>", "destination": "new", "reply": "550 5.1.1 <c@d.example> no"}
    events.add(connection, "a", [(1.0, "failed", fields)], is_sealed=True)
    (found,) = events.read(connection)
    assert found.text == "550 5.1.1 id=x destination=new"


def test_only_the_last_events_are_kept(connection: redis.Redis) -> None:
    """However many come."""
    for _ in range(3):
        events.add(connection, "a", [(float(n), "failed", {}) for n in range(90)], is_sealed=False)
    assert connection.llen(keys.EVENTS) == events.MOST
