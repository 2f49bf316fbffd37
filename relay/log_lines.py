"""The lines of the log, as text or as JSON: an event with its fields, and who else is told of it.

Control characters are escaped: nothing in a value ends a line, starts a field or speaks to the terminal. Where the
lines go, and what becomes of them when nobody takes them, is log_output.py. Logging never raises.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from json.encoder import encode_basestring as _quoted
from typing import TYPE_CHECKING, Any

from loguru import logger

from relay import log_output
from relay.mail.text import printable

if TYPE_CHECKING:
    from loguru import Message as LogMessage

_TIME = "{time:YYYY-MM-DDTHH:mm:ss.SSSZZ}"
_PLAIN = ("process", "_line", "_trace")  # keys of loguru's "extra" that are not fields of the event

# What a field may hold: anything else would stand in the line as Python writes it, which is no form to rely on.
Value = str | int | float
Values = Mapping[str, Value]


def configure(
    level: str = "info", style: str = "text", process: str = "smtp-dup", *, threads: bool | None = None
) -> None:
    """Send the log to stderr. ``style`` is "text" or "json" (one object a line).

    ``threads``: the log never blocks (log_output.py), and may use a thread for that (True) or not (False). With None,
    for commands that end soon, it is written directly and may block.
    """
    global _events  # noqa: PLW0603 - there is one log in a process
    logger.remove()
    output = None
    own = sys.stderr is sys.__stderr__ or sys.__stderr__ is None or isinstance(sys.stderr, log_output.Stream)
    if threads is not None and own:
        output = log_output.take_over(threads=threads)
        sys.stderr = log_output.Stream(output)
    logger.configure(extra={"process": process})
    if style == "json":
        logger.add(_json_sink, level=level.upper(), format="{message}")
    else:
        logger.add(
            _to_stderr, level=level.upper(), format=_text_format, colorize=False, backtrace=False, diagnose=False
        )
    _events = _Events(level, style, process, output)
    if output is not None:
        output.tell = _events.dropped


def _to_stderr(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # a log without a reader must not fail a message
        sys.stderr.write(text)


class _Events:
    """Writes events in loguru's format at a tenth of its cost, since each message has two lines or more."""

    def __init__(self, level: str, style: str, process: str, output: log_output.LogStream | None) -> None:
        # What is a warning or worse may be the last that a process says.
        self._ordinary = {"DEBUG", "INFO"} if output is not None else set[str]()
        self._soon = output.write_soon if output is not None else _to_stderr
        self._lowest = logger.level(level.upper()).no
        self._levels = {name: logger.level(name).no for name in ("DEBUG", "INFO", "WARNING", "ERROR")}
        self._compose = self._json if style == "json" else self._text
        self._process = process
        self._second = 0
        self._date = self._zone = ""

    def write(self, level: str, event: str, fields: Values) -> None:
        if self._levels[level] >= self._lowest:
            write = self._soon if level in self._ordinary else _to_stderr
            write(self._compose(level, event, fields))

    def dropped(self, count: int) -> str:
        """Return the line that reports dropped lines."""
        return self._compose("WARNING", f"{count} log lines were dropped", {"reason": "nobody took them in time"})

    def _text(self, level: str, event: str, fields: Values) -> str:
        return f"{self._time()}{self._zone} {level: <7} {self._process} {_words(event, fields)}\n"

    def _json(self, level: str, event: str, fields: Values) -> str:
        moment = self._time()  # must come first: it sets the zone
        zone = f"{self._zone[:3]}:{self._zone[3:]}"
        return _json_line(f"{moment}{zone}", level, event, {"process": self._process, **fields})

    def _time(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            local = time.localtime(second)
            self._date, self._zone = time.strftime("%Y-%m-%dT%H:%M:%S", local), time.strftime("%z", local)
            self._second = second  # must come last: another thread may run this too
        return f"{self._date}.{int((now - second) * 1000):03d}"


_events: _Events | None = None


def _text_format(record: Any) -> str:
    record["extra"]["_line"] = _words(record["message"], record["extra"])
    text = _TIME + " {level: <7} {extra[process]} {extra[_line]}\n"
    if not record["exception"]:
        return text
    # The text of an exception may come from outside: indented, it cannot pass for a log line.
    lines = "".join(traceback.format_exception(record["exception"].value)).splitlines()
    record["extra"]["_trace"] = "\n".join(f"  {printable(line)}" for line in lines)
    return text + "{extra[_trace]}\n"


def _words(event: str, fields: Values) -> str:
    words = event if event.isprintable() else printable(event)
    for key, value in fields.items():
        if key not in _PLAIN:
            text = value if type(value) is str else str(value)
            if not text.isprintable():
                text = printable(text)
            words += f" {key}={_quoted(text) if not text or ' ' in text else text}"
    return words


def _json_sink(message: LogMessage) -> None:
    record = message.record
    fields = {k: v for k, v in record["extra"].items() if k != "_line"}
    if record["exception"]:
        fields["exception"] = str(record["exception"].value)
    when = record["time"].isoformat(timespec="milliseconds")
    _to_stderr(_json_line(when, record["level"].name, record["message"], fields))


def _json_line(when: str, level: str, event: str, fields: Values) -> str:
    line: dict[str, Any] = {"time": when, "level": level.lower(), "event": event}
    line.update((k, v if isinstance(v, int | float) else str(v)) for k, v in fields.items())
    return json.dumps(line, ensure_ascii=True) + "\n"


# Gets the events that are no success, as whoever watches the mail sees them: when, which, and their fields.
on_trouble: Callable[[float, str, Values], None] | None = None
_TROUBLE = {"refused", "command refused", "deferred"}  # beside what is a warning or worse
# Gets every event; the trace keeps those about a message that it is not told of otherwise.
on_message: Callable[[float, str, Values], None] | None = None
_TOLD = {"accepted", "accepted late", "refused", "command refused", "delivered", "deferred", "failed"}


def event(level: str, name: str, /, **fields: Value) -> None:
    """Write an event of the mail log, and tell of it those who watch."""
    if on_trouble is not None and (level in {"WARNING", "ERROR"} or name in _TROUBLE):
        on_trouble(time.time(), name, fields)
    if on_message is not None and name not in _TOLD:
        on_message(time.time(), name, fields)
    if _events is None:
        logger.bind(**fields).log(level, name)
    else:
        _events.write(level, name, fields)
