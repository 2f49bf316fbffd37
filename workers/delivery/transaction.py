"""One copy in one SMTP or LMTP transaction with a backup: what each recipient's answer was.

MAIL, RCPT and DATA leave in one packet where the server offers PIPELINING, perhaps behind the dot of the transaction
before, and every reply is looked at. A copy that the server cannot represent (8-bit, SMTPUTF8, size) is refused here,
with a reason that says what to change; a body is never converted. Trouble on the connection raises its ClientError;
``sent`` on the Outcome so far tells whether the dot was out by then.
"""

from __future__ import annotations

import enum
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from relay import faultpoints
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.client.server_limits import UNLIMITED, ServerLimits
from relay.client.xforward import introduce, is_introduced, xforward
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.esmtp import MAIL_EXTENSIONS, command_line
from relay.mail.origin import of_envelope
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.mail.reply import Reply

_BODY_SECONDS = 180.0
_AT_ONCE = 64 << 10  # octets of a body that leaves in one write with its dot
# RFC 3461 4.2, RFC 6533 3; one that a server may refuse is no reason to lose the copy.
_ORCPT = re.compile(r"ORCPT=[\w.-]+;(?:[!-*,-<>-~]|[^\x00-\x7f]|\+[0-9A-F]{2})+", re.IGNORECASE)


class Stage(enum.StrEnum):
    """What a reply was the reply to."""

    MAIL = "MAIL"  # or what introduced the client before it
    RCPT = "RCPT"
    DATA = "DATA"  # or the body, before its end
    DOT = "dot"
    OWN = "own"  # to nothing: we say it ourselves, of what the server cannot take or of a connection that broke off


@dataclass(slots=True)
class Outcome:
    """What was said: for each recipient index that was asked about its reply, or the one reply that counts for all.

    ``stage`` says what that was the reply to.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)  # whose RCPT was answered with a yes
    is_begun: bool = False  # MAIL was answered with a yes
    sent: bool = False  # the dot is out
    round_trip: float | None = None  # seconds until MAIL was answered; None when it had to wait for another dot
    digestion: float | None = None  # seconds from the dot to the last reply to it

    def stage(self, index: int) -> Stage:
        """Return what a recipient's reply was the reply to."""
        if not self.is_begun:
            return Stage.MAIL
        if index not in self.accepted:
            return Stage.RCPT
        return Stage.DOT if self.sent else Stage.DATA

    @property
    def is_taken(self) -> bool:
        """Whether the dot is out and every reply is a yes."""
        for reply in self.replies.values():  # a generator would take three times as long
            if not 200 <= reply.code < 300:
                return False
        return self.sent

    def is_answered(self, asked: Sequence[int]) -> bool:
        """Whether the server has said no to all that was asked, before the dot: to MAIL, or to each of these."""
        if not self.is_begun:
            return bool(self.replies)
        return not (self.accepted or self.sent) and all(i in self.replies for i in asked)

    def forget_accepted(self) -> None:
        """Keep only what was said to those whose RCPT was refused: the message itself is not answered."""
        for i in self.accepted:
            self.replies.pop(i, None)

    @property
    def is_farewell(self) -> bool:
        """Whether the server wanted no transaction on this connection."""
        return not self.sent and bool(self.replies) and all(reply.code == 421 for reply in self.replies.values())


class Unfit(Exception):
    """This server cannot take this copy as it is; ``reply`` says why, as a 5xx of our own."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.reply = Reply.of(554, text)


class Opening(NamedTuple):
    """The commands that begin a copy's transaction with one server: DATA is last (RFC 2920 3.1)."""

    xforward: list[bytes]
    mail: bytes
    recipients: list[tuple[int, bytes]]

    @property
    def lines(self) -> list[bytes]:
        return [*self.xforward, self.mail, *[command for _, command in self.recipients], b"DATA"]


def opening(connection: Connection, message: Message, owed: Sequence[int]) -> Opening:
    """Return what begins a copy's transaction for the recipients with these indices. Raises Unfit.

    Where the server announces how many it takes (RFC 9422), for the first of them only.
    """
    envelope = message.envelope
    if connection.limits is not UNLIMITED:
        owed = _within(connection.limits, envelope, owed)
    return Opening(
        xforward(of_envelope(envelope), connection) if "XFORWARD" in connection.extensions else [],
        mail_command(envelope, connection.destination, connection),
        [(i, rcpt_command(envelope.recipients[i], connection)) for i in owed],
    )


def _within(limits: ServerLimits, envelope: Envelope, owed: Sequence[int]) -> list[int]:
    taken: list[int] = []
    domains: set[str] = set()
    for i in owed:
        domain = envelope.recipients[i].domain
        if len(taken) < limits.recipients and (domain in domains or len(domains) < limits.domains):
            taken.append(i)
            domains.add(domain)
    return taken


def can_follow(connection: Connection, message: Message) -> bool:
    """Say whether a transaction may begin behind a dot: the server offers PIPELINING and needs no XCLIENT before it."""
    extensions = connection.extensions
    if "XCLIENT" not in extensions:  # as nearly always
        return "PIPELINING" in extensions and not connection.introduced
    return "PIPELINING" in extensions and is_introduced(connection, of_envelope(message.envelope))


async def send(
    connection: Connection,
    message: Message,
    owed: Sequence[int],
    outcome: Outcome,
    *,
    timeout: float,
    final_timeout: float,
    begun: Opening | None = None,
    following: Callable[[], Opening | None] = lambda: None,
) -> None:
    """Send a copy to the recipients with these indices; fills ``outcome``. Raises ClientError, Unfit.

    ``begun`` has been sent already, behind the dot before; what ``following`` returns is sent behind this one.
    """
    if begun is None:
        refusal = await introduce(connection, of_envelope(message.envelope), timeout=timeout)
        if refusal is not None:
            outcome.replies.update(dict.fromkeys(owed, refusal))
            return
    accepted = await _ask(connection, begun, begun or opening(connection, message, owed), outcome, timeout)
    if accepted is None:
        return
    connection.begin_data()
    if not accepted:
        # Every recipient was refused and it says 354 all the same (RFC 2920 3.1): an empty message, refused at its dot.
        connection.end_body()
        await connection.reply(timeout=timeout)
        connection.end_data()
        return
    body = message.body
    if len(body) > _AT_ONCE:
        await connection.write_body(body, timeout=_BODY_SECONDS)
        body = b""
        early = connection.early_reply
        if early is not None:
            outcome.replies.update(dict.fromkeys(accepted, early))
            raise ClientError("the server spoke before the end of the message", stage="message body", reply=early)
    lmtp = connection.destination.scheme == "lmtp"
    then = following()
    connection.end_body(body, replies=len(accepted) if lmtp else 1, then=then.lines if then else ())
    outcome.sent = True
    faultpoints.reach("body sent")
    outcome.forget_accepted()
    dot = time.monotonic()
    for i in accepted if lmtp else ():
        outcome.replies[i] = await connection.reply(timeout=final_timeout)
    if not lmtp:
        outcome.replies.update(dict.fromkeys(accepted, await connection.reply(timeout=final_timeout)))
    outcome.digestion = time.monotonic() - dot
    connection.end_data()


async def _ask(
    connection: Connection, begun: Opening | None, asked: Opening, outcome: Outcome, timeout: float
) -> list[int] | None:
    """Send XFORWARD, MAIL, RCPT and DATA; returns the recipients accepted once DATA has got its 354, else None."""
    pipelining = begun is not None or "PIPELINING" in connection.extensions
    if pipelining and begun is None:
        connection.send(*asked.lines)
    answer = connection.reply if pipelining else connection.command
    for command in asked.xforward:
        await answer(command, timeout=timeout)  # whatever it says to them: they are for its log
    started = time.monotonic()
    reply_to_mail = await answer(asked.mail, timeout=timeout)
    if begun is None and not asked.xforward:
        outcome.round_trip = time.monotonic() - started
    accepted = outcome.accepted
    outcome.is_begun = is_begun = reply_to_mail.is_positive
    if not is_begun:
        outcome.replies.update((i, reply_to_mail) for i, _ in asked.recipients)
    for i, command in asked.recipients if is_begun or pipelining else ():
        reply = await answer(command, timeout=timeout)
        if is_begun:
            outcome.replies[i] = reply
            if reply.is_positive:
                accepted.append(i)
    if not accepted and not pipelining:
        return None
    return _go(await answer(b"DATA", timeout=timeout), accepted, outcome)


def _go(reply: Reply, accepted: list[int], outcome: Outcome) -> list[int] | None:
    """Read the reply to DATA: what ``_ask`` returns."""
    if reply.code == 354:
        return accepted
    if reply.code < 400:  # out of step, or no SMTP server: not a yes to the message
        for i in accepted:
            del outcome.replies[i]
        raise ClientError(f"the server answered DATA with {reply.code}", stage="DATA")
    outcome.replies.update(dict.fromkeys(accepted, reply))
    return None


def mail_command(envelope: Envelope, destination: Destination, connection: Connection) -> bytes:
    """Return MAIL for this server. Raises Unfit."""
    extensions = connection.extensions
    # Once by name, instead of a search for each; of two with one name the first counts.
    given: dict[str, str] = {}
    parameters: list[str] = []
    if envelope.parameters:
        given = {name.upper(): text for name, _, text in (p.partition("=") for p in reversed(envelope.parameters))}
        parameters = _needed(given, destination, extensions)
    if "SIZE" in extensions:
        limit = extensions["SIZE"].strip()
        if limit.isascii() and limit.isdigit() and 0 < int(limit) < envelope.size:
            raise Unfit(f"5.3.4 the message has {envelope.size} octets, the backup takes {limit}: raise its size limit")
        parameters.append(f"SIZE={envelope.size}")
    if given:
        optional = _optional(given, envelope.received_at)
        parameters += [p for p in optional if MAIL_EXTENSIONS[p.partition("=")[0]] in extensions]
    sender = "" if destination.sender == "null" else envelope.sender
    return command_line("MAIL FROM", sender, parameters)


def _needed(given: Mapping[str, str], destination: Destination, extensions: Mapping[str, str]) -> list[str]:
    """Return the parameters without which the message must not be sent. Raises Unfit."""
    parameters = []
    if "SMTPUTF8" in given:
        if "SMTPUTF8" not in extensions:
            raise Unfit("5.6.7 the backup does not offer SMTPUTF8, which this message needs: enable it there")
        parameters.append("SMTPUTF8")
    body = given.get("BODY")
    if body is not None and body.upper() != "7BIT":
        if "8BITMIME" not in extensions:
            raise Unfit("5.6.3 the backup does not offer 8BITMIME, which this message needs: enable it there")
        parameters.append(f"BODY={body}")
    if "REQUIRETLS" in given:
        if "REQUIRETLS" not in extensions or destination.tls != "verify":
            raise Unfit(
                "5.7.30 the message must travel with REQUIRETLS: offer it there, and set tls = verify for it here"
            )
        parameters.append("REQUIRETLS")
    return parameters


def _optional(given: Mapping[str, str], received_at: float) -> Iterator[str]:
    """Yield what is said where it is understood and else left out; how long to hold the copy, while that lies ahead."""
    now = time.time()
    for name in ("AUTH", "MT-PRIORITY", "HOLDFOR", "HOLDUNTIL"):
        text = given.get(name)
        if text is None:
            continue
        if name == "HOLDFOR":
            is_count = text.isascii() and text.isdigit() and len(text) < 12
            # Never longer than was asked for, should this host's clock be behind.
            left = min(int(text), int(received_at + int(text) - now)) if is_count else 0
            text = str(left) if left > 0 else ""
        elif name == "HOLDUNTIL":
            try:
                due = datetime.fromisoformat(text.upper())
            except ValueError:
                continue
            text = text if due.tzinfo is not None and due.timestamp() > now else ""
        if text:
            yield f"{name}={text}"


def rcpt_command(recipient: Recipient, connection: Connection) -> bytes:
    """Return RCPT for this server; where DSN is offered nobody is ever notified about a copy."""
    if "DSN" not in connection.extensions:
        return command_line("RCPT TO", recipient.address, [])
    kept = filter(_ORCPT.fullmatch, recipient.parameters)
    return command_line("RCPT TO", recipient.address, ["NOTIFY=NEVER", *kept])
