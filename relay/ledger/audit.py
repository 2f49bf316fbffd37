"""Who changed what, when and why: what operators do to the mail and to the servers' roles, in the order of doing.

A stream of about 10,000 entries in Redis, read by ``smtp-dup audit``; each act is a line in the log of the process that
does it as well. What is stored is text, cut where it is long; what is read back is data, never trusted.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

from redis import Redis

from relay import maillog
from relay.ledger import keys
from relay.mail.ids import text as as_text
from relay.mail.stored import parsed
from relay.mail.text import printable

_KEPT = 10_000
_CUT = 1000  # characters of one value
_PAGE = 500
_TEXTS = ("who", "host", "command", "before", "after", "reason")


_acting: ContextVar[str] = ContextVar("acting", default="")


@contextmanager
def acting(name: str) -> Iterator[None]:
    """Let what is done in here be done by somebody else than this process's user: whoever is logged in at the page."""
    before = _acting.set(name)
    try:
        yield
    finally:
        _acting.reset(before)


def operator() -> str:
    """Return who acts: who is said to, the user before sudo, else the login name or number of the process's user."""
    if acting_name := _acting.get():
        return acting_name
    if name := os.environ.get("SUDO_USER"):
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry, as in a container
        return str(os.geteuid())


@dataclass(frozen=True, slots=True)
class Act:
    """One change: the command's words, what it is about, and how that was before and is after; reason "" for none.

    ``at`` is seconds since the epoch by Redis's clock, 0 for one that is not recorded yet.
    """

    command: str
    before: str = ""
    after: str = ""
    reason: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    who: str = field(default_factory=operator)
    host: str = field(default_factory=socket.gethostname)
    at: float = 0.0


def add(pipe: Any, act: Act) -> None:
    """Add the recording to a pipeline, sync or async: where there is one, in the MULTI of the change itself."""
    fields = {name: _cut(value) for name in _TEXTS if (value := getattr(act, name))}
    fields["details"] = json.dumps({name: _cut(value) for name, value in act.details.items()})
    pipe.xadd(keys.AUDIT, fields, maxlen=_KEPT, approximate=True)


def record(connection: Redis, act: Act) -> None:
    """Record a change that is done, here and in the log. Raises RedisError; the line is in the log all the same."""
    said = {"before": act.before, "after": act.after, "reason": act.reason, **act.details}
    fields = {name: _cut(value) for name, value in said.items() if value}
    maillog.notice("info", "operator", command=act.command, who=act.who, **fields)
    add(connection, act)


def acts(connection: Redis, since: float = 0.0) -> Iterator[Act]:
    """Yield what was done since then (seconds since the epoch), newest first. Raises RedisError."""
    newest, oldest = "+", str(round(since * 1000)) if since > 0 else "-"
    while entries := cast("list[Any]", connection.xrevrange(keys.AUDIT, newest, oldest, count=_PAGE)):
        for entry, fields in entries:
            yield _read(as_text(entry), fields)
        newest = "(" + as_text(entries[-1][0])


def _read(entry: str, fields: Mapping[bytes, bytes]) -> Act:
    values = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
    details: dict[str, str] = {}
    with suppress(ValueError, AttributeError):
        details = {printable(str(n)): printable(str(v)) for n, v in parsed(values.get("details", "{}")).items()}
    milliseconds = entry.partition("-")[0]
    at = int(milliseconds) / 1000 if milliseconds.isdecimal() else 0.0
    text = {name: printable(values.get(name, "")) for name in _TEXTS}
    return Act(**text, details=details, at=at)


def _cut(value: str) -> str:
    text = printable(value)
    return text if len(text) <= _CUT else text[: _CUT - 3] + "..."
