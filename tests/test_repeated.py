"""Trouble that repeats itself is a few lines, not a flood; what is tried again has longer and longer pauses."""

from __future__ import annotations

import pytest

from relay import maillog, repeated
from relay.mail.ids import IdSource


def test_what_has_no_end_is_told_once_a_minute_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, those of the next minute with the line after it; kinds do not hide each other."""
    now = [0.0]
    monkeypatch.setattr(repeated.time, "monotonic", lambda: now[0])
    seldom = repeated.Seldom()
    told = []
    for _ in range(125):
        told.append((seldom.times("a"), seldom.times("b") if now[0] >= 30 else 0))
        now[0] += 1.0
    assert {second: times for second, times in enumerate(told) if any(times)} == {
        0: (1, 0),
        30: (0, 1),
        60: (60, 0),
        90: (0, 60),
        120: (60, 0),
    }


def test_ledger_trouble_is_few_lines_whatever_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that fails every second, and a failure for each of many messages, are a line a minute each."""
    now = [1000.0]
    monkeypatch.setattr(repeated.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(maillog, "_seldom", repeated.Seldom())
    lines: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(maillog, "_event", lambda _, event, **fields: lines.append((event, fields)))
    source = IdSource()
    for _ in range(100):
        maillog.ledger_trouble(f"release {source.next()}", OSError("refused"))
        maillog.ledger_trouble("renewing leases", OSError("refused"))
        maillog.dispatch_delayed("new", 5, OSError("refused"))
        maillog.page_login_refused("192.0.2.1", "ann", "too many tries")  # a stranger may try for ever
        now[0] += 1.0
    assert [event for event, _ in lines] == ["ledger trouble", "ledger trouble", "dispatch delayed", "page refused"] * 2
    assert ["times" in fields for _, fields in lines] == [False] * 4 + [True] * 4
    assert lines[-1][1]["times"] == 60


def test_begin_once_a_minute_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is told at once, those of the next minute are counted, the end is told once."""
    now = [0.0]
    monkeypatch.setattr(repeated.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    trouble = repeated.Repeated("Redis", lines.append, lines.append)
    trouble.is_over()
    for _ in range(120):
        trouble.came("refused")
        now[0] += 1.0
    trouble.is_over()
    trouble.is_over()
    trouble.came("refused")
    assert lines == ["Redis: refused", "Redis: refused (61 times)", "Redis: over, after 120 times", "Redis: refused"]


def test_pauses_grow_up_to_the_longest() -> None:
    """Each is twice the one before; what works begins anew."""
    pauses = repeated.Backoff(0.5, 3.0)
    assert pauses.is_at_first
    assert [pauses.next() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert not pauses.is_at_first
    pauses.reset()
    assert pauses.is_at_first
    assert pauses.next() == 0.5


async def test_tried_until_it_is_done() -> None:
    """Each error is told, and the answer is the first that comes without one."""
    errors = [OSError("first"), LookupError("second")]
    told: list[Exception] = []

    async def attempt() -> str:
        if errors:
            raise errors.pop(0)
        return "done"

    assert await repeated.until_done(attempt, told.append, repeated.Backoff(0.001, 0.001)) == "done"
    assert [str(error) for error in told] == ["first", "second"]


async def test_what_is_not_to_be_outlasted_ends_it() -> None:
    """Whoever is told of an error may raise it."""

    async def attempt() -> None:
        raise LookupError("a fault of ours")

    def trouble(error: Exception) -> None:
        raise error

    with pytest.raises(LookupError, match="a fault of ours"):
        await repeated.until_done(attempt, trouble, repeated.Backoff(60.0, 60.0))
