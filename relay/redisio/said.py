"""What an error of Redis says to an operator, where Redis's own words speak to a programmer."""

from __future__ import annotations

_WANTS_A_PASSWORD = ("HELLO must be called", "Authentication required", "NOAUTH")


def said(error: BaseException) -> str:
    """Return the text of an error."""
    text = str(error)
    if any(words in text for words in _WANTS_A_PASSWORD):
        return "it wants a password, and redis.url has none"
    return text
