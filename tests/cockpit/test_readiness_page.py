"""docs/readiness.md tells of every criterion, and of its settings with their defaults."""

from __future__ import annotations

import re
from pathlib import Path

from relay.cockpit.criteria import CRITERIA
from relay.config.options import BY_KEY

PAGE = (Path(__file__).parents[2] / "docs" / "readiness.md").read_text(encoding="utf-8")


def test_the_page_has_a_row_for_each_criterion_with_its_settings() -> None:
    """Names, order and settings are those that `smtp-dup ready --explain` shows."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]*) \|", PAGE, re.MULTILINE)
    assert [(int(number), name) for number, name, _ in rows] == [(c.number, c.name) for c in CRITERIA]
    for (_, _, told), criterion in zip(rows, CRITERIA, strict=True):
        assert re.findall(r"`([a-z_0-9.]+)`", told.replace("`false`", "").replace("`true`", "")) == [
            key.removeprefix("ready.") for key in criterion.settings
        ]
        assert all(key in BY_KEY for key in criterion.settings)


def test_each_setting_of_readiness_belongs_to_a_criterion() -> None:
    """None is asked for and heeded by nobody."""
    heeded = {key for criterion in CRITERIA for key in criterion.settings}
    assert {key for key in BY_KEY if key.startswith("ready.")} <= heeded
