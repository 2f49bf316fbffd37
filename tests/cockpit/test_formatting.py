"""How the cockpit says lengths of time and sizes."""

from __future__ import annotations

from itertools import pairwise

from relay.cockpit.formatting import octets, span
from relay.mail.stored import LATEST


def test_nothing_is_younger_than_now() -> None:
    """A clock that is ahead by a little makes nothing a day old."""
    assert [span(seconds) for seconds in (-2.0, -86400.0, -LATEST, 0.0, 59.9)] == ["0 s", "0 s", "0 s", "0 s", "59 s"]
    assert (span(90061.0), span(90061.0, "")) == ("1 d 1 h", "1d 1h")


def test_a_size_has_three_digits_before_the_point_at_most() -> None:
    """Also where it is rounded; and a larger one never looks smaller."""
    around = [n + offset for n in (1000, 10**6, 10**9) for offset in (-n // 10**4, -n // 10**5, -1, 0, n // 10)]
    for number in around:
        assert float(octets(number).split()[0]) < 1000, number
    units = ("bytes", "KB", "MB", "GB")
    shown = [(units.index(unit), float(size)) for size, unit in (octets(n).split() for n in sorted(around))]
    assert all(one <= other for one, other in pairwise(shown))
