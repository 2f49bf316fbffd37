"""The recipients of a transaction: RCPT read, checked against the domains that are relayed for, and written again."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from relay.mail.esmtp import RCPT_EXTENSIONS, command_line
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.smtpd.syntax import SyntaxProblem, argument_text, carried, check, meaningful, parse_path

NOT_RELAYED = Reply.of(554, "5.7.1 Relaying to this domain is not allowed")


def parse_recipient(argument: str, offered: Collection[str]) -> Recipient:
    """Parse the argument of RCPT. Raises SyntaxProblem."""
    address, given = parse_path(argument, "TO")
    if given:
        check(given, RCPT_EXTENSIONS, offered)
        given = meaningful(given)
    if not address:
        raise SyntaxProblem(501, "5.1.3 A recipient needs an address")
    return Recipient(address, given)


def typed_path(text: str, keyword: str) -> str:
    """Return the path that MAIL (FROM) or RCPT (TO) would have of an address as it was typed, "" for the null sender.

    Angle brackets may be left out. Raises SyntaxProblem for what the relay refuses, parameters among it.
    """
    path = text if text.startswith("<") and text.endswith(">") else f"<{text}>"
    found, parameters = parse_path(argument_text(f"{keyword}:{path}".encode("utf-8", "surrogateescape")), keyword)
    if parameters or (keyword == "TO" and not found):
        raise SyntaxProblem(501, "5.1.3 A recipient needs an address")
    return found


def is_relayed(recipient: Recipient, allowed_domains: Collection[str]) -> bool:
    """Return whether mail for this recipient is relayed; Postmaster needs no domain (RFC 5321 4.5.1).

    Not with a route in the local part: a primary that trusts the relay would forward it, as an open relay.
    """
    if not allowed_domains or recipient.address.lower() == "postmaster":
        return True
    local = recipient.address.rpartition("@")[0]
    return recipient.domain in allowed_domains and not any(mark in local for mark in "@%!")


def rcpt_command(recipient: Recipient, available: Mapping[str, str]) -> bytes:
    """Return RCPT for a server with these extensions. Raises SyntaxProblem."""
    address, given = recipient
    return command_line("RCPT TO", address, carried(given, RCPT_EXTENSIONS, available) if given else ())
