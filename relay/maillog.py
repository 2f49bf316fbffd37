"""The mail log: one function for each event, so that names and fields stay the same wherever an event is logged.

A new event is a new function here. Each line has the event's name, the message id if there is one, which finds all
lines about a message, and key=value fields; never a body, a subject or a password. log_lines.py writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

from loguru import logger

from relay.log_lines import Value, Values
from relay.log_lines import event as _event
from relay.mail.envelope import Envelope
from relay.mail.ids import is_id
from relay.mail.reply import Reply
from relay.repeated import Seldom

_ADDRESSES = 10  # recipients in a line

_seldom = Seldom()


# --- the primary leg ------------------------------------------------------------------------------------------


def _named(envelope: Envelope, to: Sequence[str]) -> Values:
    """Return the fields that say which message it is, and, where they are to be named, for whom."""
    named: dict[str, Value] = {"message_id": envelope.message_id} if envelope.message_id else {}
    if to:
        more = len(to) - _ADDRESSES
        named["to"] = ",".join([*(f"<{address}>" for address in to[:_ADDRESSES]), *([f"and {more} more"] * (more > 0))])
    return named


def accepted(
    envelope: Envelope,
    reply: Reply,
    seconds: float,
    *,
    late: bool = False,
    to: Sequence[str] = (),
    primary: str = "",
) -> None:
    """The primary accepted the message; its copies are released. ``late``: the client had disconnected.

    ``to`` are the recipients, with log.addresses; ``primary`` names the server where there are routes.
    """
    way = {"route": envelope.route, "primary": primary} if envelope.route else {}
    _event(
        "INFO",
        "accepted late" if late else "accepted",
        id=envelope.id,
        sender=f"<{envelope.sender}>",
        recipients=len(envelope.recipients),
        size=envelope.size,
        client=envelope.client_address,
        copies=",".join(envelope.destinations) or "none",
        **way,
        seconds=round(seconds, 3),
        **_named(envelope, to),
        reply=reply.text,
    )


def table_read(file: str, keys: int) -> None:
    """The file of a table has changed, and its new content holds."""
    _event("INFO", "table read", file=file, keys=keys)


def table_refused(file: str, reason: str) -> None:
    """The file of a table cannot be used as it is; what it held before goes on to hold."""
    _event("WARNING", "table refused", file=file, reason=reason)


def failover(route: str, server: str, substitute: str, reason: str) -> None:
    """A server of a route cannot be used, and the next one gets its mail; told once until it is back."""
    _event("WARNING", "failover", route=route, server=server, to=substitute, reason=reason)


def primary_down(server: str, reason: str) -> None:
    """A server that has a substitute cannot be used."""
    _event("WARNING", "primary down", server=server, reason=reason)


def primary_back(server: str, seconds: float) -> None:
    """A server that could not be used is used again."""
    _event("INFO", "primary back", server=server, after=f"{seconds:.0f}s")


def split_refused(envelope: Envelope, server: str, copy: str, recipients: int, reply: Reply) -> None:
    """A primary refused for good what others took of one message: its client has heard 250, and nobody bounces."""
    _event("ERROR", "split refused", id=envelope.id, server=server, copy=copy, recipients=recipients, reply=reply.text)


def split_copied(envelope: Envelope, server: str, copy: str, recipients: int, reply: Reply | None) -> None:
    """A primary did not take now what others took of one message: it gets a copy. Without a reply it may repeat."""
    said = reply.text if reply is not None else "no reply to the dot: the copy may repeat it"
    _event("WARNING", "split copied", id=envelope.id, server=server, copy=copy, recipients=recipients, reply=said)


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
    """The primary, or a rule of the relay, refused MAIL, RCPT or DATA."""
    _event("INFO", "command refused", client=client, command=command, reply=reply.text)


def commands_refused(client: str, count: int) -> None:
    """``count`` more commands were refused on a connection; the log has no lines of their own for them."""
    _event("INFO", "more commands refused", client=client, count=count)


def tls_failed(client: str, reason: str) -> None:
    """The TLS handshake with a client failed."""
    _event("INFO", "tls failed", client=client, reason=reason)


def proxy_failed(client: str, reason: str) -> None:
    """A connection did not begin with a valid PROXY header; it was closed."""
    _event("WARNING", "proxy header refused", client=client, reason=reason)


def logged_in(client: str, user: str) -> None:
    """A user has logged in."""
    _event("INFO", "logged in", client=client, user=user)


def login_refused(client: str, user: str, reason: str = "") -> None:
    """A login with a wrong name or password; with a ``reason``, the password was not checked."""
    _event("WARNING", "login refused", client=client, user=user, **({"reason": reason} if reason else {}))


def page_logged_in(client: str, user: str, role: str, how: str) -> None:
    """Somebody has logged in to the page, by password or by a link of `smtp-dup open`."""
    _event("INFO", "page opened", client=client, user=user, role=role, by=how)


def page_login_refused(client: str, user: str, reason: str = "") -> None:
    """A login to the page with a wrong name or password; with a ``reason``, the password was not checked.

    Wrong ones are few, since tries are limited; the others are logged once a minute for each reason, with a count.
    """
    if not reason:
        _event("WARNING", "page refused", client=client, user=user)
    elif times := _seldom.times(f"page refused {reason}"):
        _event("WARNING", "page refused", client=client, user=user, reason=reason, **_more(times))


def uncertain(envelope: Envelope, hold_seconds: float, reason: str) -> None:
    """The connection to the primary was lost between the dot and its reply."""
    _event(
        "WARNING", "uncertain", id=envelope.id, sender=f"<{envelope.sender}>", hold_seconds=hold_seconds, reason=reason
    )


def abandoned(message_id: str, hold_seconds: float) -> None:
    """A relay process died between staging and the primary's reply; the client will send the message again."""
    _event("WARNING", "uncertain", id=message_id, hold_seconds=hold_seconds, reason="the relay process died")


def not_durable(envelope: Envelope, reason: str) -> None:
    """Neither Redis nor the spool could be written; relay.require_durable_copies decides the reply to the client."""
    _event("ERROR", "not durable", id=envelope.id, sender=f"<{envelope.sender}>", reason=reason)


def copy_lost(envelope: Envelope) -> None:
    """The primary accepted a message whose copy could not be stored; relay.require_durable_copies is false."""
    lost = ",".join(envelope.destinations)
    _event("ERROR", "copy lost", id=envelope.id, sender=f"<{envelope.sender}>", copies=lost)


def spooled(envelope: Envelope, reason: str) -> None:
    """The copy was written to the spool instead of the ledger."""
    _event("WARNING", "spooled", id=envelope.id, reason=reason)


def unspooled(message_id: str, copies: tuple[str, ...]) -> None:
    """A spooled message is in the ledger now."""
    _event("INFO", "unspooled", id=message_id, copies=",".join(copies) or "none")


def spool_set_aside(name: str, reason: str) -> None:
    """A file of the spool cannot be used; it is kept in the folder ``corrupt`` for the operator."""
    _event("ERROR", "spool file set aside", file=name, reason=reason)


def record_damaged(message_id: str, destination: str, reason: str) -> None:
    """A stored message is damaged: it is kept for the operator and never sent."""
    _event("ERROR", "damaged record", id=message_id, destination=destination, reason=reason)


def spool_unfinished(name: str) -> None:
    """A process was killed while it wrote a file, before any 2xx; the file is kept in ``unfinished``."""
    _event("WARNING", "spool file unfinished", file=name, reason="its process was killed before the client heard 2xx")


def spool_trouble(what: str, error: BaseException) -> None:
    """Reading or writing the spool failed."""
    _event("ERROR", "spool trouble", what=what, reason=f"{type(error).__name__}: {error}")


def primary_trouble(address: str, stage: str, reason: str) -> None:
    """The primary could not be used; the client got 451."""
    _event("WARNING", "primary trouble", primary=address, stage=stage, reason=reason)


def session_error(client: str, error: BaseException) -> None:
    """An unexpected exception in a session; the client got 451."""
    logger.bind(client=client).opt(exception=error).error("session error")


def task_failed(what: str, error: BaseException) -> None:
    """An unexpected exception in a background task, which is started again."""
    logger.bind(what=what).opt(exception=error).error("task failed")


def dispatch_delayed(destination: str, waiting: int, error: BaseException) -> None:
    """RQ jobs could not be written; the copies are pending in the ledger, and get their jobs later."""
    if times := _seldom.times(f"dispatch delayed {destination}"):
        _event(
            "WARNING", "dispatch delayed", destination=destination, waiting=waiting, reason=str(error), **_more(times)
        )


def ledger_trouble(what: str, error: BaseException) -> None:
    """Redis returned an error or did not reply; the operation is tried again.

    What fails every second or for every message, while Redis is down, is logged once a minute, with a count.
    """
    kind = " ".join(word for word in what.split() if not is_id(word))
    if times := _seldom.times(f"ledger trouble {kind}"):
        _event("WARNING", "ledger trouble", what=what, reason=f"{type(error).__name__}: {error}", **_more(times))


def _more(times: int) -> dict[str, int]:
    return {"times": times} if times > 1 else {}


# --- the backup leg -------------------------------------------------------------------------------------------


def delivered(
    envelope: Envelope, destination: str, recipients: int, attempts: int, age: float, *, to: Sequence[str] = ()
) -> None:
    """A backup accepted a copy for this number of recipients; ``age`` is in seconds since acceptance."""
    _event(
        "INFO",
        "delivered",
        id=envelope.id,
        destination=destination,
        recipients=recipients,
        attempts=attempts,
        age=round(age, 3),
        **_named(envelope, to),
    )


def deferred(
    message_id: str, destination: str, recipients: int, attempts: int, reply: str, next_seconds: float
) -> None:
    """A copy is still owed to this number of recipients and will be tried again."""
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
    """A copy is put on the failed list for this number of recipients."""
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
    """A backup is paused (the breaker opened): only probes are sent to it."""
    _event(
        "WARNING", "destination paused", destination=destination, probe_seconds=round(probe_seconds, 1), reason=reason
    )


def destination_resumed(destination: str, paused_seconds: float) -> None:
    """A probe succeeded; delivery starts again, with one connection at first."""
    _event("INFO", "destination resumed", destination=destination, paused_seconds=round(paused_seconds, 1))


def destination_held(destination: str, reason: str, by: str, seconds: float) -> None:
    """An operator holds it: no copy goes there now; seconds below 0 are until it is released."""
    ends = {"seconds": round(seconds, 1)} if seconds > 0 else {}
    _event("WARNING", "destination held", destination=destination, reason=reason, by=by, **ends)


def destination_released(destination: str, *, has_ended: bool) -> None:
    """Its hold was released, or has come to its end: delivery goes on."""
    reason = "the hold has ended" if has_ended else "released"
    _event("WARNING", "destination released", destination=destination, reason=reason)


def body_missing(message_id: str, destination: str) -> None:
    """The body of a pending copy is missing; the copy is removed and counted."""
    _event("ERROR", "body missing", id=message_id, destination=destination)


def failure_expired(message_id: str, destination: str, ttl: float) -> None:
    """A failed copy was kept for failed.ttl and is deleted."""
    _event("WARNING", "failed copy expired", id=message_id, destination=destination, ttl_seconds=round(ttl))


def uncertain_copied(message_id: str, destination: str, recipients: int, covered: int, spare_of: str = "") -> None:
    """The copy of an uncertain message is delivered, except to ``covered`` recipients of an accepted repetition.

    ``spare_of`` is the message that a forked one's spare was made of, which the client and all other lines know.
    """
    of = {"message": spare_of} if spare_of else {}
    _event(
        "WARNING",
        "uncertain copied",
        id=message_id,
        destination=destination,
        recipients=recipients,
        covered=covered,
        **of,
    )


def uncertain_covered(message_id: str) -> None:
    """The copy of an uncertain message is dropped: a repetition was accepted for all its recipients."""
    _event("INFO", "uncertain covered", id=message_id)


def requeued(message_id: str, destination: str, job: str) -> None:
    """A pending copy that no RQ job would deliver gets a new job."""
    _event("WARNING", "requeued", id=message_id, destination=destination, job=job)


def moved(message_id: str, destination: str, target: str) -> None:
    """An operator moved a copy to another destination."""
    _event("INFO", "moved", id=message_id, destination=destination, to=target)


# --- processes ------------------------------------------------------------------------------------------------


def promoted(primary: str, former: str, epoch: int, *, by: str, reason: str) -> None:
    """Transactions that begin from now on have another primary; one that has begun goes on with the former."""
    fields = {"by": by, "reason": reason}
    said = {name: value for name, value in fields.items() if value}
    _event("INFO", "promoted", primary=primary, former=former, epoch=epoch, **said)


def started(what: str, **fields: Value) -> None:
    """A process has started."""
    _event("INFO", f"{what} started", **fields)


def stopping(what: str, **fields: Value) -> None:
    """A process begins to drain."""
    _event("INFO", f"{what} stopping", **fields)


def stopped(what: str, **fields: Value) -> None:
    """A process has drained."""
    _event("INFO", f"{what} stopped", **fields)


def notice(level: str, text: str, **fields: Value) -> None:
    """Log anything that is no mail event: settings, persistence, reconciliation."""
    _event(level.upper(), text, **fields)
