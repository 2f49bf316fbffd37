"""Reads and writes stored forms. They are not trusted: JSON that is none raises ValueError, a wrong type TypeError."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json import encoder as _encoder
from typing import Any

from relay.mail.text import printable

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # never sent in a command, see relay.client.connection

_SHOWN = 300  # characters of a text that is for people
LATEST = 1e11  # seconds since the epoch that can be right (the year 5138)
LARGEST = 1 << 53
_HUGEST = 1e308  # beyond it are infinities, and whole numbers that no float holds; NaN is not within
_MOST_DIGITS = 19  # of a whole number: what is longer is none of ours, and no float holds it


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError("a number with too many digits")
    return int(digits)


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


_decoder = json.JSONDecoder(parse_int=_whole, parse_constant=_constant)
# A public attribute of JSONDecoder that typeshed does not list: it reads one value at a place, without the search for
# blanks around it that decode() makes.
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]  # not in typeshed


def parsed(data: bytes | str | memoryview) -> Any:
    """Parse stored JSON. Raises ValueError for anything else, for deep nesting and for numbers that are none."""
    text = data if isinstance(data, str) else str(data, "utf-8")
    try:
        try:
            found, end = _scan(text, 0)  # decode() takes twice as long
        except StopIteration:
            found, end = None, -1
        return found if end == len(text) else _decoder.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def parsed_object(data: bytes | str) -> dict[str, Any] | None:
    """Parse stored JSON; None for anything but an object."""
    try:
        found = parsed(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _writer() -> Callable[[Any], str]:
    """Return what writes JSON in ASCII, without blanks.

    The library makes an encoder for each value, which takes longer than to write one of ours: this one is kept. It does
    not look for circles.
    """
    ordinary = json.JSONEncoder(separators=(",", ":"), check_circular=False)
    make: Any = getattr(_encoder, "c_make_encoder", None)
    if make is None:  # as in an interpreter that is not CPython
        return ordinary.encode
    write = make(None, ordinary.default, _encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(write(value, 0))


to_json = _writer()


def any_text(value: object) -> str:
    """Return the value if it is a str. Raises TypeError."""
    if value.__class__ is str:
        return value
    raise TypeError("not a text")


def shown(value: object) -> str:
    """Return the value if it is a str, to be shown: printable, cut where it is long. Raises TypeError."""
    return printable(any_text(value)[:_SHOWN])


def line(value: object) -> str:
    """Return the value if it is a str that can be sent in a command. Raises TypeError."""
    # Nearly always; costs a tenth of the search below, and each call here is one for each address of each message.
    if value.__class__ is str and value.isascii() and value.isprintable():
        return value
    text = any_text(value)
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
    if values.__class__ is list:
        return tuple(map(line, values)) if values else ()
    raise TypeError("not a list")


def number(value: object) -> float:
    """Return the value if it is a finite number. Raises TypeError."""
    if (value.__class__ is float or value.__class__ is int) and -_HUGEST <= value <= _HUGEST:
        return value
    raise TypeError("not a number")


def figure(value: bytes | None, most: float) -> float:
    """Return what a field of a hash holds as a number from 0 to ``most``; 0 for what is none."""
    try:
        found = float(value or 0)
    except ValueError:
        return 0.0
    return found if 0 <= found <= most else 0.0


def moment(score: float) -> float:
    """Return the score of a sorted set, which may be infinite, as a time in seconds since the epoch."""
    return min(max(score, 0.0), LATEST)


def tally(score: float) -> int:
    """Return the score of a sorted set, which may be infinite, as a count."""
    return int(min(max(score, 0.0), LARGEST))
