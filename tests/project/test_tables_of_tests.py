"""Each row of docs/failures.md and docs/security.md names a test that exists, and says what no other row says."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from support.documents import ROOT

TESTS = ROOT / "tests"
DIALOGUES = TESTS / "smtpd" / "dialogues"


def rows(page: str) -> Iterator[list[str]]:
    """Yield the rows of the tables whose last column is the test."""
    is_wanted = False
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if not line.startswith("|"):
            is_wanted = False
        elif cells[-1] == "test":
            is_wanted = True
        elif is_wanted and not set(line) <= set("|- "):
            yield cells


@pytest.mark.parametrize("page", ["failures.md", "security.md"])
def test_each_row_names_a_test_that_exists(page: str) -> None:
    """By its file, with the folder where two have that name; a dialogue by its folder."""
    found = list(rows(page))
    assert len(found) > 30
    for first, *_, last in found:
        names = re.findall(r"`([\w/]+)`(?: \(([\w, ]+)\))?", last)
        assert names, first
        for name, parts in names:
            assert len(list(TESTS.rglob(f"{name}.py"))) == 1, f"{first}: {name}"
            if name == "test_dialogues":
                assert parts, first
                assert all((DIALOGUES / part).is_dir() for part in parts.split(", ")), f"{first}: {parts}"


@pytest.mark.parametrize("page", ["failures.md", "security.md"])
def test_no_row_is_there_twice(page: str) -> None:
    """Neither word for word, nor in other words with all the rest the same."""
    told: dict[tuple[str, ...], str] = {}
    for first, *rest in rows(page):
        for key in ((first,), tuple(rest)):
            assert key not in told, f"{first}: as {told[key]}"
            told[key] = first
