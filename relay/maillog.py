"""The mail log: one function per event, so that its words never drift; one id finds a message's whole life.

Every line has the event's name, the message id where there is one, and key=value fields. No body, no
subject, no password; control characters are escaped. ``configure`` chooses text or JSON lines.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from loguru import logger

from relay import log_output
from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.mail.text import printable

if TYPE_CHECKING:
    from loguru import Message as LogMessage

_TIME = "{time:YYYY-MM-DDTHH:mm:ss.SSSZZ}"
_quoted = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one at every call
_PLAIN = ("process", "_line", "_trace")  # of a record's extra: not fields of the event

Values = Mapping[str, Any]


def configure(
    level: str = "info", style: str = "text", process: str = "smtp-dup", *, threads: bool | None = None
) -> None:
    """Send the log to stderr. ``style`` is "text" or "json" (one object a line).

    With ``threads`` nobody ever waits for it (log_output.py): whether it may have one. None is for commands that end.
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
    _events = _Events(level, style, process)
    if output is not None:
        output.tell = _events.dropped


def _to_stderr(text: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it: no reason to fail a message
        sys.stderr.write(text)


class _Events:
    """Lines of events as loguru would write them, at a tenth of its price: there are two for every message."""

    def __init__(self, level: str, style: str, process: str) -> None:
        self._lowest = logger.level(level.upper()).no
        self._levels = {name: logger.level(name).no for name in ("DEBUG", "INFO", "WARNING", "ERROR")}
        self._compose = self._json if style == "json" else self._text
        self._process = process
        self._second = 0
        self._date = self._zone = ""

    def write(self, level: str, event: str, fields: Values) -> None:
        if self._levels[level] >= self._lowest:
            _to_stderr(self._compose(level, event, fields))

    def dropped(self, count: int) -> str:
        """Return the line that says how many are missing."""
        return self._compose("WARNING", f"{count} log lines were dropped", {"reason": "nobody took them in time"})

    def _text(self, level: str, event: str, fields: Values) -> str:
        return f"{self._time()}{self._zone} {level: <7} {self._process} {_words(event, fields)}\n"

    def _json(self, level: str, event: str, fields: Values) -> str:
        moment = self._time()  # first: the zone is known from then on
        zone = f"{self._zone[:3]}:{self._zone[3:]}"
        return _json_line(f"{moment}{zone}", level, event, {"process": self._process, **fields})

    def _time(self) -> str:
        now = time.time()
        second = int(now)
        if second != self._second:
            local = time.localtime(second)
            self._date, self._zone = time.strftime("%Y-%m-%dT%H:%M:%S", local), time.strftime("%z", local)
            self._second = second  # last: another thread may be at it, too
        return f"{self._date}.{int((now - second) * 1000):03d}"


_events: _Events | None = None


def _text_format(record: Any) -> str:
    record["extra"]["_line"] = _words(record["message"], record["extra"])
    text = _TIME + " {level: <7} {extra[process]} {extra[_line]}\n"
    if not record["exception"]:
        return text
    # What an exception says may come from outside: indented, none of its lines passes for one of ours.
    lines = "".join(traceback.format_exception(record["exception"].value)).splitlines()
    record["extra"]["_trace"] = "\n".join(f"  {printable(line)}" for line in lines)
    return text + "{extra[_trace]}\n"


def _words(event: str, fields: Values) -> str:
    parts = [printable(event)]
    for key, value in fields.items():
        if key not in _PLAIN:
            text = value if type(value) is str else str(value)
            if not text.isprintable():
                text = printable(text)
            parts.append(f"{key}={_quoted(text) if not text or ' ' in text else text}")
    return " ".join(parts)


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


def _event(level: str, event: str, **fields: Any) -> None:
    if _events is None:
        logger.bind(**fields).log(level, event)
    else:
        _events.write(level, event, fields)


# --- the primary leg ------------------------------------------------------------------------------------------


def accepted(envelope: Envelope, reply: Reply, seconds: float, *, late: bool = False) -> None:
    """The primary took the message; its copies are released."""
    _event(
        "INFO",
        "accepted late" if late else "accepted",
        id=envelope.id,
        sender=f"<{envelope.sender}>",
        recipients=len(envelope.recipients),
        size=envelope.size,
        client=envelope.client_address,
        copies=",".join(envelope.destinations) or "none",
        seconds=round(seconds, 3),
        reply=reply.text,
    )


def refused(envelope: Envelope, reply: Reply) -> None:
    """The primary refused the message at its end; nothing is copied."""
    _event(
        "INFO",
        "refused",
        id=envelope.id,
        sender=f"<{envelope.sender}>",
        client=envelope.client_address,
        reply=reply.text,
    )


def command_refused(client: str, command: str, reply: Reply) -> None:
    """The primary, or a rule of ours, refused MAIL, RCPT or DATA."""
    _event("INFO", "command refused", client=client, command=command, reply=reply.text)


def commands_refused(client: str, count: int) -> None:
    """So many more were refused on one connection than there are lines for."""
    _event("INFO", "more commands refused", client=client, count=count)


def tls_failed(client: str, reason: str) -> None:
    """A client and we did not come to terms about TLS."""
    _event("INFO", "tls failed", client=client, reason=reason)


def proxy_failed(client: str, reason: str) -> None:
    """A connection did not begin with a PROXY header that can be used; it was closed."""
    _event("WARNING", "proxy header refused", client=client, reason=reason)


def logged_in(client: str, user: str) -> None:
    """A user has logged in."""
    _event("INFO", "logged in", client=client, user=user)


def login_refused(client: str, user: str, reason: str = "") -> None:
    """A name and a password that do not belong together, or to nobody; with a reason, they were not looked at."""
    _event("WARNING", "login refused", client=client, user=user, **({"reason": reason} if reason else {}))


def uncertain(envelope: Envelope, hold_seconds: float, reason: str) -> None:
    """The primary went away between the dot and its reply."""
    _event(
        "WARNING", "uncertain", id=envelope.id, sender=f"<{envelope.sender}>", hold_seconds=hold_seconds, reason=reason
    )


def abandoned(message_id: str, hold_seconds: float) -> None:
    """A relay process died between staging and the primary's reply; the client sends again."""
    _event("WARNING", "uncertain", id=message_id, hold_seconds=hold_seconds, reason="the relay process died")


def not_durable(envelope: Envelope, reason: str) -> None:
    """Neither Redis nor the spool could take the copy; the settings decide what the client hears."""
    _event("ERROR", "not durable", id=envelope.id, sender=f"<{envelope.sender}>", reason=reason)


def copy_lost(envelope: Envelope) -> None:
    """The primary accepted a message whose copy could be stored nowhere, and the settings let that stand."""
    lost = ",".join(envelope.destinations)
    _event("ERROR", "copy lost", id=envelope.id, sender=f"<{envelope.sender}>", copies=lost)


def spooled(envelope: Envelope, reason: str) -> None:
    """The copy went to the spool instead of the ledger."""
    _event("WARNING", "spooled", id=envelope.id, reason=reason)


def unspooled(message_id: str, copies: tuple[str, ...]) -> None:
    """A spooled message is in the ledger now."""
    _event("INFO", "unspooled", id=message_id, copies=",".join(copies) or "none")


def spool_set_aside(name: str, reason: str) -> None:
    """A file of the spool cannot be used; it is kept in the folder ``corrupt`` for a person to look at."""
    _event("ERROR", "spool file set aside", file=name, reason=reason)


def record_damaged(message_id: str, destination: str, reason: str) -> None:
    """A stored message is not what was stored, or is no message: it is kept for a person to look at, and never sent."""
    _event("ERROR", "damaged record", id=message_id, destination=destination, reason=reason)


def spool_unfinished(name: str) -> None:
    """A file was half written when its process was killed; kept in ``unfinished``, it is nobody's loss."""
    _event("WARNING", "spool file unfinished", file=name, reason="its process was killed before the client heard 2xx")


def spool_trouble(what: str, error: BaseException) -> None:
    """The spool's disk refused something."""
    _event("ERROR", "spool trouble", what=what, reason=f"{type(error).__name__}: {error}")


def primary_trouble(address: str, stage: str, reason: str) -> None:
    """The primary could not be used; the client was told 451."""
    _event("WARNING", "primary trouble", primary=address, stage=stage, reason=reason)


def session_error(client: str, error: BaseException) -> None:
    """Something in a session that should not happen; the client was told 451."""
    logger.bind(client=client).opt(exception=error).error("session error")


def task_failed(what: str, error: BaseException) -> None:
    """Something in the background that should not happen; it is started again."""
    logger.bind(what=what).opt(exception=error).error("task failed")


def dispatch_delayed(destination: str, waiting: int, error: BaseException) -> None:
    """Jobs could not be written; the copies are pending in the ledger all the same."""
    _event("WARNING", "dispatch delayed", destination=destination, waiting=waiting, reason=str(error))


def ledger_trouble(what: str, error: BaseException) -> None:
    """Redis refused or did not answer; what depends on it is tried again."""
    _event("WARNING", "ledger trouble", what=what, reason=f"{type(error).__name__}: {error}")


# --- the backup leg -------------------------------------------------------------------------------------------


def delivered(message_id: str, destination: str, recipients: int, attempts: int, age: float) -> None:
    """A backup took a copy, for so many recipients; age in seconds since it was accepted."""
    _event(
        "INFO",
        "delivered",
        id=message_id,
        destination=destination,
        recipients=recipients,
        attempts=attempts,
        age=round(age, 3),
    )


def deferred(
    message_id: str, destination: str, recipients: int, attempts: int, reply: str, next_seconds: float
) -> None:
    """A copy stays owed to so many recipients and is tried again."""
    _event(
        "INFO",
        "deferred",
        id=message_id,
        destination=destination,
        recipients=recipients,
        attempts=attempts,
        next_seconds=round(next_seconds),
        reply=reply,
    )


def failed(message_id: str, destination: str, recipients: int, attempts: int, reply: str) -> None:
    """A copy is in the failed list for so many recipients."""
    _event(
        "WARNING",
        "failed",
        id=message_id,
        destination=destination,
        recipients=recipients,
        attempts=attempts,
        reply=reply,
    )


def repeated(message_id: str, destination: str, reason: str) -> None:
    """A copy may reach its backup twice: the worker died, or the reply was lost."""
    _event("WARNING", "may repeat", id=message_id, destination=destination, reason=reason)


def destination_paused(destination: str, reason: str, probe_seconds: float) -> None:
    """The breaker opened: only probes go there now."""
    _event(
        "WARNING", "destination paused", destination=destination, probe_seconds=round(probe_seconds, 1), reason=reason
    )


def destination_resumed(destination: str, paused_seconds: float) -> None:
    """A probe went through; delivery starts again, one connection first."""
    _event("INFO", "destination resumed", destination=destination, paused_seconds=round(paused_seconds, 1))


def body_missing(message_id: str, destination: str) -> None:
    """A pending copy has no body any more; it is removed and counted."""
    _event("ERROR", "body missing", id=message_id, destination=destination)


def failure_expired(message_id: str, destination: str, ttl: float) -> None:
    """A failed copy was kept for failed.ttl and is dropped."""
    _event("WARNING", "failed copy expired", id=message_id, destination=destination, ttl_seconds=round(ttl))


def uncertain_copied(message_id: str, destination: str, recipients: int, covered: int) -> None:
    """Nobody knows whether the primary took it: a copy goes out all the same, but for recipients that a twin covers."""
    _event(
        "WARNING", "uncertain copied", id=message_id, destination=destination, recipients=recipients, covered=covered
    )


def uncertain_covered(message_id: str) -> None:
    """An uncertain message has nobody left to be copied for: a twin was accepted for them all."""
    _event("INFO", "uncertain covered", id=message_id)


def requeued(message_id: str, destination: str, job: str) -> None:
    """A pending copy that no RQ job would have delivered has a new one."""
    _event("WARNING", "requeued", id=message_id, destination=destination, job=job)


def moved(message_id: str, destination: str, target: str) -> None:
    """An operator moved a copy to another destination, where it is tried at once or listed as failed."""
    _event("INFO", "moved", id=message_id, destination=destination, to=target)


# --- processes ------------------------------------------------------------------------------------------------


def promoted(primary: str, former: str, epoch: int, *, by: str, reason: str) -> None:
    """Transactions that begin from now on have another primary; one that has begun goes on with the former."""
    fields = {"by": by, "reason": reason}
    said = {name: value for name, value in fields.items() if value}
    _event("INFO", "promoted", primary=primary, former=former, epoch=epoch, **said)


def started(what: str, **fields: Any) -> None:
    """A process is ready."""
    _event("INFO", f"{what} started", **fields)


def stopping(what: str, **fields: Any) -> None:
    """A process drains."""
    _event("INFO", f"{what} stopping", **fields)


def stopped(what: str, **fields: Any) -> None:
    """A process has drained."""
    _event("INFO", f"{what} stopped", **fields)


def notice(level: str, text: str, **fields: Any) -> None:
    """Anything about the product itself that is no mail event: configuration, persistence, reconciliation."""
    _event(level.upper(), text, **fields)
