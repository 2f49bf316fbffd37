"""The last events of mail that are no success, of all hosts, for people who watch: the log's words, shortened.

Where mail is sealed (storage.key_file) only codes and names of ours are kept of them: no address stands in Redis in the
clear. What is read back is data; what makes no sense is no event.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.ledger import keys
from relay.ledger.changes import Pipe
from relay.mail.stored import any_text, number, parsed
from relay.mail.text import printable

MOST = 100  # events that are kept
_CUT = 200  # characters of a text
_CODE = re.compile(r"\d{3}(?:[ -]\d\.\d{1,3}\.\d{1,3})?")
_OURS = ("id", "destination", "recipients", "attempts", "copies", "count")  # fields without a word of anybody else


@dataclass(frozen=True, slots=True)
class Event:
    """One event: when, where, what, and its fields in words."""

    at: float
    host: str
    event: str
    text: str


def add(pipe: Pipe, host: str, found: Sequence[tuple[float, str, Mapping[str, Any]]], *, is_sealed: bool) -> None:
    """Add events, the oldest first."""
    records = [json.dumps([at, host, event, _words(fields, is_sealed=is_sealed)]) for at, event, fields in found]
    if records:
        pipe.lpush(keys.EVENTS, *records[-MOST:])
        pipe.ltrim(keys.EVENTS, 0, MOST - 1)


def _words(fields: Mapping[str, Any], *, is_sealed: bool) -> str:
    shown = dict(fields)
    if is_sealed:
        shown = {key: value for key, value in fields.items() if key in _OURS}
        code = _CODE.match(str(fields.get("reply", "")))
        shown |= {"reply": code[0]} if code else {}
    reply = shown.pop("reply", None)
    words = [f"{key}={value}" for key, value in shown.items()]
    return printable(" ".join([*([str(reply)] if reply else []), *words]))[:_CUT]


def read(connection: Any, most: int = MOST) -> list[Event]:
    """Return the last events, the newest first. Raises RedisError."""
    pipe = connection.pipeline(transaction=False)
    pipe.lrange(keys.EVENTS, 0, most - 1)
    (found,) = pipe.execute(raise_on_error=False)
    events = []
    for record in found if isinstance(found, list) else ():
        try:
            at, host, event, text = parsed(record)
            events.append(Event(number(at), _text(host), _text(event), _text(text)))
        except (ValueError, TypeError):
            continue
    return sorted(events, key=lambda event: -event.at)


def _text(value: Any) -> str:
    return printable(any_text(value)[:_CUT])[:_CUT]
