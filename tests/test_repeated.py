"""Trouble that repeats itself is a few lines, not a flood."""

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
