"""Ten million messages' worth of files: a look-up takes well under a second. In short, the same with fewer of them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from relay.trace import files
from relay.trace.lookup import Query, Unseen, find, lives
from support.traced import fill

_SECONDS = 1.0


def _look(folder: Path, hours: int, messages: int) -> dict[str, float]:
    """Look up one message of the oldest hour by each of its words; returns the processor seconds of each."""
    n = messages // 3
    spent = {}
    recipient = f"user0.{n}@d{n % 200}.example"
    (life,) = find(Query.of([recipient]), folder)
    for word in (recipient, f"<0.{n}@s.example>", life.id, f"OLD0x{n}", f"NEW0x{n}"):
        unseen = Unseen()
        begun = time.process_time()
        (found,) = find(Query.of([word]), folder, unseen=unseen)
        spent[word] = time.process_time() - begun
        assert (found.id, found.status, unseen.files, unseen.damaged) == (life.id, "delivered", hours, [])
    begun = time.process_time()
    newest = list(find(Query.of(["@d3.example"]), folder))
    spent["@d3.example"] = time.process_time() - begun
    assert len(newest) == min(50, hours * messages // 200)
    assert [each.at for each in newest] == sorted((each.at for each in newest), reverse=True)
    begun = time.process_time()
    assert list(find(Query.of(["nobody@nowhere.example"]), folder)) == []
    spent["nobody"] = time.process_time() - begun
    begun = time.process_time()
    assert {each.id for each in lives([each.id for each in newest], folder)} == {each.id for each in newest}
    spent["50 ids"] = time.process_time() - begun
    return spent


def test_a_day_of_hours(tmp_path: Path) -> None:
    """Each message is found among all files, the newest first."""
    fill(tmp_path, hours=24, messages=400, until=1_795_800_000)
    _look(tmp_path, 24, 400)


@pytest.mark.long
def test_ten_million_messages(tmp_path: Path) -> None:
    """A hundred hours of a hundred thousand: under a second of processor time, whatever is looked for.

    All hours but the oldest are copies of one, since a look-up reads no other pages for that.
    """
    messages, hours = 100_000, 100
    fill(tmp_path, hours=2, messages=messages, until=1_795_800_000)
    oldest, newest = files.listed(tmp_path)
    oldest.path.rename(files.named(tmp_path, newest.hour - files.HOUR * (hours - 1), "up", 1).path)
    for n in range(1, hours - 1):
        shutil.copyfile(newest.path, files.named(tmp_path, newest.hour - files.HOUR * n, "up", 1).path)
    spent = _look(tmp_path, hours, messages)
    assert max(spent.values()) < _SECONDS, spent
