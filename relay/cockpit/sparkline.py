"""A row of numbers as a line of small bars."""

from __future__ import annotations

from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
_ASCII = "_.-:=+*#"


def sparkline(values: Sequence[float], *, encoding: str = "utf-8") -> str:
    """Return a bar for each value, as high as its share of the largest; a blank for nothing at all.

    Where the terminal's encoding has no such bars they are ASCII.
    """
    try:
        _BARS.encode(encoding)
        bars = _BARS
    except (UnicodeEncodeError, LookupError):
        bars = _ASCII
    top = max(values, default=0)
    return "".join(" " if value <= 0 else bars[min(7, int(8 * value / top))] if top else bars[0] for value in values)
