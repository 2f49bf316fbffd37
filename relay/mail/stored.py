"""Type checks for the fields of a stored form, since stored data is not trusted. A wrong type raises TypeError."""

from __future__ import annotations

import math
import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # never sent in a command, see relay.client.connection


def any_text(value: object) -> str:
    """Return the value if it is a str. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def line(value: object) -> str:
    """Return the value if it is a str that can be sent in a command. Raises TypeError."""
    text = any_text(value)
    if text.isascii() and text.isprintable():  # nearly always; costs a tenth of the search below
        return text
    if _CONTROL.search(text):
        raise TypeError("a control character in a command")
    if not text.isascii():
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise TypeError("half a character in a command") from error
    return text


def texts(values: object) -> tuple[str, ...]:
    """Return the value as a tuple if it is a list of addresses or parameters. Raises TypeError."""
    if not isinstance(values, list):
        raise TypeError("not a list")
    return tuple(map(line, values)) if values else ()


def number(value: object) -> float:
    """Return the value if it is a finite number. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("not a number")
    return value
