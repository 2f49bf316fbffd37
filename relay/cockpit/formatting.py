"""How the cockpit says numbers and lengths of time to people."""

from __future__ import annotations

import time

from relay.mail.stored import LATEST
from relay.mail.text import count as count  # noqa: PLC0414  (numbers are said here, too)


def span(seconds: float, gap: str = " ") -> str:
    """Return a length of time in its two largest units: "2 d 4 h", "14 m", "3 s"; without a gap for a column."""
    rest = int(min(max(seconds, 0), LATEST))  # what Redis holds may be anything, and another host's clock be ahead
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        number, rest = divmod(rest, length)
        if number or (unit == "s" and not parts):
            parts.append(f"{number}{gap}{unit}")
        if len(parts) == 2 or (parts and unit == "m"):
            break
    return " ".join(parts)


def duration(seconds: float | None, gap: str = " ") -> str:
    """Return a short time, as of a reply: "18 ms", "1.4 s"; without a gap for a column."""
    if seconds is None:
        return "-"
    if seconds < 0.0095:
        return f"{seconds * 1000:.1f}{gap}ms"
    return f"{seconds * 1000:.0f}{gap}ms" if seconds < 0.9995 else f"{seconds:.1f}{gap}s"


def octets(number: int) -> str:
    """Return a size as people say it: "25.0 MB"."""
    size, unit = float(number), "bytes"
    for larger in ("KB", "MB", "GB"):
        if size < 999.95:  # which is shown as 999.9
            break
        size, unit = size / 1000, larger
    return f"{number} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def hour_of_week(start: float) -> str:
    """Return the hour that a moment is in: "Monday 09-10", in the local zone."""
    local = time.localtime(start)
    return f"{time.strftime('%A', local)} {local.tm_hour:02d}-{(local.tm_hour + 1) % 24:02d}"


def some(names: list[str], most: int = 3) -> str:
    """Return the first few of many."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def address(text: str) -> str:
    """Return a sender or recipient; the null sender as it is written in SMTP."""
    return text or "<>"


def moment(seconds: float | None) -> str:
    """Return a time, seconds since the epoch, in the local zone."""
    return clock("%Y-%m-%d %H:%M:%S", seconds) if seconds else "-"


def time_of_day(seconds: float) -> str:
    """Return a time of today, seconds since the epoch, in the local zone."""
    return clock("%H:%M:%S", seconds)


def clock(form: str, seconds: float) -> str:
    """Return a time, seconds since the epoch, in the local zone; a number that is in no calendar as it is."""
    try:
        return time.strftime(form, time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g}"
