"""Text for people: what comes from outside, safe to log and to show on a terminal, and numbers of things."""

from __future__ import annotations


def count(number: int, one: str, many: str = "") -> str:
    """Return "1 recipient", "1,200 recipients"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def printable(text: str) -> str:
    """Return text with every control character escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
