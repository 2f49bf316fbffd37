"""Makes text from outside safe to log and to show on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with every control character escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
