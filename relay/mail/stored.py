"""Fields of a stored form, read as what they must be: data from outside is never taken at its word."""

from __future__ import annotations

import math
import re

_LINE_END = re.compile(r"[\x00\r\n]")


def any_text(value: object) -> str:
    """Return a text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def line(value: object) -> str:
    """Return an address or a parameter of an envelope: a line end would end the command. Raises TypeError."""
    text = any_text(value)
    if not text.isprintable() and _LINE_END.search(text):
        raise TypeError("a line end in a command")
    return text


def texts(values: object) -> tuple[str, ...]:
    """Return a list of addresses or parameters. Raises TypeError."""
    if not isinstance(values, list):
        raise TypeError("not a list")
    return tuple(map(line, values)) if values else ()


def number(value: object) -> float:
    """Return a finite number. Raises TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("not a number")
    return value
