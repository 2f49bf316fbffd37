"""What the client hears of the primary's replies: the same, except where they are not about the message.

A reply about the relay or the connection, or none at all, becomes a temporary one here and nowhere else: unknown means
temporary. Nothing here does I/O, and nothing raises.
"""

from __future__ import annotations

from relay.client.errors import ClientError, NoExchanger
from relay.mail.reply import Reply

ABOUT_US = (530, 534, 535, 538)  # the server wants the relay to authenticate: RFC 4954 6
TOO_MANY = Reply.of(452, "4.5.3 Too many recipients")
LOST = Reply.of(451, "4.4.2 Lost the connection to the primary server, try again later")
NOT_AVAILABLE = Reply.of(451, "4.4.1 The primary server is not available, try again later")
UNEXPECTED = Reply.of(451, "4.3.0 Unexpected reply of the primary server")


def for_client(reply: Reply) -> Reply:
    """Return the reply for the client, made of the primary's reply to MAIL, RCPT or DATA."""
    if reply.code == 421:
        return Reply(451, reply.lines)
    if reply.code in ABOUT_US or not 200 <= reply.code < 600 or 300 <= reply.code < 400:
        return Reply.of(451, "4.3.5 The primary server does not accept mail from this relay")
    return reply


def for_client_at_rcpt(reply: Reply, *, is_first: bool) -> Reply:
    """Return the reply for the client, made of the primary's reply to RCPT.

    Too many recipients in this transaction is no permanent fault of the recipient: whatever the primary's code, the
    client gets 452 and sends to the rest in another transaction (RFC 5321 4.5.3.1.10).
    """
    if reply.is_permanent and not is_first and _is_about_the_transaction(reply):
        return TOO_MANY
    return for_client(reply)


def _is_about_the_transaction(reply: Reply) -> bool:
    return reply.is_too_many_recipients or (reply.code in (452, 552) and not reply.status)


def for_client_at_end(reply: Reply) -> Reply:
    """Return the reply for the client, made of the primary's reply to the final dot."""
    if 200 <= reply.code < 300:
        return reply
    return for_client(reply) if 400 <= reply.code < 600 else UNEXPECTED


def for_client_early(reply: Reply) -> Reply:
    """Return the reply for the client, made of one that the primary sent before it had read the final dot.

    The primary usually closes after such a reply; still, a permanent one is about this message (552).
    """
    return LOST if reply.is_positive else for_client_at_end(reply)


def for_client_unconnected(error: ClientError) -> Reply:
    """Return the reply for the client where no connection to the primary can be had."""
    if isinstance(error, NoExchanger):
        return Reply.of(451, error.told)
    if error.reply is not None and error.reply.code in (421, 450, 451, 452):
        return Reply(451, error.reply.lines)
    return NOT_AVAILABLE
