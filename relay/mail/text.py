"""Text that came from outside, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with every control character escaped, so that it can be shown and logged."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
