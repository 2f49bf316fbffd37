"""A refusal is in the class that says what to do about it, with or without an enhanced code."""

from __future__ import annotations

import pytest

from relay.mail import refusal_class
from relay.mail.reply import Reply
from relay.mail.reply_text import Known, normalise

KNOWN = Known("ann@a.example", "bob@b.example")


@pytest.mark.parametrize(
    ("code", "text", "name"),
    [
        (550, "5.1.1 <ann@a.example>: Recipient address rejected: User unknown in local table", "no such mailbox"),
        (550, "5.1.10 RESOLVER.ADR.RecipientNotFound; Recipient not found by SMTP address lookup", "no such mailbox"),
        (550, "No such user here", "no such mailbox"),
        (550, "unknown user", "no such mailbox"),
        (550, "5.1.0 Address rejected", "no such mailbox"),
        (550, "Unrouteable address", "no such mailbox"),
        (550, "5.0.0 <ann@a.example> User doesn't exist: ann@a.example", "no such mailbox"),
        (550, "5.2.1 The email account that you tried to reach is disabled", "mailbox disabled"),
        (552, "5.2.2 <ann@a.example> Quota exceeded (mailbox for user is full)", "mailbox full"),
        (452, "4.2.2 The recipient's inbox is out of storage space", "mailbox full"),
        (550, "Mailbox is over quota", "mailbox full"),
        (552, "5.3.4 Message size exceeds fixed limit", "too large"),
        (552, "Message size exceeds maximum permitted", "too large"),
        (552, "Requested mail action aborted", "too large"),
        (554, "5.7.1 <ann@a.example>: Relay access denied", "relaying denied"),
        (550, "relay not permitted", "relaying denied"),
        (553, "sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)", "relaying denied"),
        (550, "5.7.1 Unable to relay", "relaying denied"),
        (554, "5.7.1 Service unavailable; Client host [192.0.2.1] blocked using zen.spamhaus.org", "policy"),
        (550, "5.7.26 Unauthenticated email from b.example is not accepted due to domain's DMARC policy", "policy"),
        (554, "Message rejected as spam", "policy"),
        (530, "5.7.0 Authentication required", "authentication"),
        (530, "Must issue a STARTTLS command first", "authentication"),
        (550, "5.7.8 Authentication required", "authentication"),
        (550, "5.7.1 Sender address x@bad.example rejected: not allowed", "sender refused"),
        (554, "5.7.1 <x@bad.example>: Sender address rejected: Access denied", "sender refused"),
        (550, "5.1.8 <bob@b.example>: Sender address rejected: Domain not found", "sender refused"),
        (554, "5.6.7 the backup does not offer SMTPUTF8, which this message needs", "protocol"),
        (501, "5.5.4 Invalid arguments", "protocol"),
        (500, "Line too long", "protocol"),
        (450, "4.2.0 <ann@a.example>: Recipient address rejected: Greylisted, see http://x.example", "greylisting"),
        (451, "4.7.1 Greylisting in action, please come back later", "greylisting"),
        (451, "Graylisted", "greylisting"),
        (450, "4.7.1 try again later", "policy"),
        (451, "4.7.28 Our system has detected an unusual rate of mail", "rate limit"),
        (450, "Too many messages, slow down", "rate limit"),
        (451, "4.4.4 No route to host", "routing"),
        (451, "4.3.0 Queue file write error", "server trouble"),
        (550, "Nope", "other"),
        (550, "5.9.9 What", "other"),
        (550, "", "other"),
    ],
)  # fmt: skip
def test_a_reply_is_in_its_class(code: int, text: str, name: str) -> None:
    """The common replies of common servers, and those of servers that say little."""
    status, words = normalise(Reply(code, (text,)), KNOWN)
    assert refusal_class.classify(code, status, words).name == name


def test_each_class_says_what_to_do() -> None:
    """Each has a name of its own and one line for the operator; a name from elsewhere is "other"."""
    names = [found.name for found in refusal_class.CLASSES]
    assert len(set(names)) == len(names)
    for found in refusal_class.CLASSES:
        assert found.advice.endswith((".", ";"))
        assert "\n" not in found.advice
        assert len(found.advice) <= 120
        assert refusal_class.named(found.name) is found
    assert refusal_class.named("what Redis held") is refusal_class.OTHER
