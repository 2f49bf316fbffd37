"""One copy in one SMTP or LMTP transaction with a backup: what each recipient's answer was.

MAIL, RCPT and DATA leave in one packet where the server offers PIPELINING, and every reply is looked at. A
copy that the server cannot represent (8-bit, SMTPUTF8, size) is refused here, with a reason that says what
to change; a body is never converted. Trouble on the connection raises its ClientError; ``sent`` on the
Outcome so far tells whether the dot was out by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.connection import ClientError, Connection
from relay.envelope import Destination, Envelope, Message, Recipient, Reply
from relay.identity import introduce, of_envelope, xforward
from relay.parameters import value

_BODY_SECONDS = 180.0
_AT_ONCE = 64 << 10  # octets of a body that leaves in one write with its dot


@dataclass(slots=True)
class Outcome:
    """What was said: for each recipient index that was asked about its reply, or the one reply that counts for all."""

    replies: dict[int, Reply] = field(default_factory=dict)
    sent: bool = False  # the dot is out


class Unfit(Exception):
    """This server cannot take this copy as it is; ``reply`` says why, as a 5xx of our own."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.reply = Reply.of(554, text)


async def send(
    connection: Connection,
    message: Message,
    owed: Sequence[int],
    outcome: Outcome,
    *,
    timeout: float,
    final_timeout: float,
) -> None:
    """Send a copy to the recipients with these indices; fills ``outcome``. Raises ClientError, Unfit."""
    identity = of_envelope(message.envelope)
    turned_away = await introduce(connection, identity, timeout=timeout)
    if turned_away is not None:
        outcome.replies.update(dict.fromkeys(owed, turned_away))
        return
    accepted = await _ask(connection, message.envelope, xforward(identity, connection), owed, outcome, timeout)
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
    connection.end_body(body, replies=len(accepted) if lmtp else 1)
    outcome.sent = True
    for i in accepted if lmtp else ():
        outcome.replies[i] = await connection.reply(timeout=final_timeout)
    if not lmtp:
        outcome.replies.update(dict.fromkeys(accepted, await connection.reply(timeout=final_timeout)))
    connection.end_data()


async def _ask(
    connection: Connection,
    envelope: Envelope,
    told: Sequence[bytes],
    owed: Sequence[int],
    outcome: Outcome,
    timeout: float,
) -> list[int] | None:
    """Send XFORWARD, MAIL, RCPT and DATA; returns the recipients accepted once DATA has got its 354, else None."""
    mail = mail_command(envelope, connection.destination, connection)
    recipients = [(i, rcpt_command(envelope.recipients[i], connection)) for i in owed]
    pipelining = "PIPELINING" in connection.extensions
    if pipelining:
        connection.send(*told, mail, *(command for _, command in recipients), b"DATA")

    async def answer(command: bytes) -> Reply:
        return await (connection.reply(timeout=timeout) if pipelining else connection.command(command, timeout=timeout))

    for command in told:
        await answer(command)  # whatever it says to them: they are for its log
    begun = await answer(mail)
    accepted = []
    if not begun.is_positive:
        outcome.replies.update(dict.fromkeys(owed, begun))
    for i, command in recipients if begun.is_positive or pipelining else ():
        reply = await answer(command)
        if begun.is_positive:
            outcome.replies[i] = reply
            if reply.is_positive:
                accepted.append(i)
    if not accepted and not pipelining:
        return None
    go = await answer(b"DATA")
    if go.code != 354:
        outcome.replies.update(dict.fromkeys(accepted, go))
        return None
    return accepted


def mail_command(envelope: Envelope, destination: Destination, connection: Connection) -> bytes:
    """Return MAIL for this server. Raises Unfit."""
    extensions = connection.extensions
    parameters = []
    if value(envelope.parameters, "SMTPUTF8") is not None:
        if "SMTPUTF8" not in extensions:
            raise Unfit("5.6.7 the backup does not offer SMTPUTF8, which this message needs: enable it there")
        parameters.append("SMTPUTF8")
    body = value(envelope.parameters, "BODY")
    if body is not None and body.upper() != "7BIT":
        if "8BITMIME" not in extensions:
            raise Unfit("5.6.3 the backup does not offer 8BITMIME, which this message needs: enable it there")
        parameters.append(f"BODY={body}")
    if value(envelope.parameters, "REQUIRETLS") is not None:
        if "REQUIRETLS" not in extensions or destination.tls != "verify":
            raise Unfit(
                "5.7.30 the message must travel with REQUIRETLS: offer it there, and set tls = verify for it here"
            )
        parameters.append("REQUIRETLS")
    if "SIZE" in extensions:
        limit = extensions["SIZE"].strip()
        if limit.isascii() and limit.isdigit() and 0 < int(limit) < envelope.size:
            raise Unfit(f"5.3.4 the message has {envelope.size} octets, the backup takes {limit}: raise its size limit")
        parameters.append(f"SIZE={envelope.size}")
    sender = "" if destination.sender == "null" else envelope.sender
    return _wire("MAIL FROM", sender, parameters)


def rcpt_command(recipient: Recipient, connection: Connection) -> bytes:
    """Return RCPT for this server; where DSN is offered nobody is ever notified about a copy."""
    if "DSN" not in connection.extensions:
        return _wire("RCPT TO", recipient.address, [])
    kept = [p for p in recipient.parameters if p[:6].upper() == "ORCPT="]
    return _wire("RCPT TO", recipient.address, ["NOTIFY=NEVER", *kept])


def _wire(verb: str, address: str, parameters: Sequence[str]) -> bytes:
    return " ".join((f"{verb}:<{address}>", *parameters)).encode("utf-8", "surrogateescape")
