"""Trouble that repeats itself is a few lines, not a flood; what is tried again has longer and longer pauses."""

from __future__ import annotations

import pytest

from relay import repeated


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
