"""What a server announces in its EHLO reply: its extensions, and among them its limits, LIMITS (RFC 9422).

One limit of Exim's it does not announce.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from relay.mail.destination import MESSAGES_PER_CONNECTION, Destination
from relay.mail.reply import Reply


class ServerLimits(NamedTuple):
    """The most transactions on a connection, RCPT commands and recipient domains in a transaction."""

    mails: int = sys.maxsize
    recipients: int = sys.maxsize
    domains: int = sys.maxsize


UNLIMITED = ServerLimits()
_OLD_AUTH = re.compile("^auth=", re.IGNORECASE)  # as some servers wrote it before RFC 2554
# Exim says yes to what comes after so many messages on a connection, but leaves it to its queue runner, half an hour
# later perhaps (smtp_accept_queue_per_connection). It is known by how it says so: its greeting may have been changed.
_EXIM_TAKES = 10
_EXIM_YES = "OK id="
_FIELDS = {"MAILMAX": "mails", "RCPTMAX": "recipients", "RCPTDOMAINMAX": "domains"}


def server_limits(extensions: Mapping[str, str]) -> ServerLimits:
    """Return the announced limits. A value that cannot be parsed, or 0, means no limit (RFC 9422 3)."""
    text = extensions.get("LIMITS")
    if not text:
        return UNLIMITED
    found: dict[str, int] = {}
    for word in text.split():
        name, _, number = word.partition("=")
        field = _FIELDS.get(name.upper())
        # A value has at most six digits, the first one not 0 (RFC 9422 3).
        if field and number.isascii() and number.isdigit() and len(number) <= 6 and int(number):
            found[field] = min(int(number), found.get(field, sys.maxsize))
    return ServerLimits(**found)


def extensions_in(lines: Sequence[str]) -> dict[str, str]:
    """Return the extensions, keyword in capitals -> parameters, that these lines of the reply announce."""
    words = [_OLD_AUTH.sub("AUTH ", line).partition(" ") for line in lines]
    return {keyword.upper(): parameters.strip() for keyword, _, parameters in words if keyword}


def after_yes(limits: ServerLimits, reply: Reply, destination: Destination) -> ServerLimits:
    """Return the limits of a server that has taken a message with this reply. What an operator has set counts alone."""
    if not reply.lines[0].startswith(_EXIM_YES) or destination.messages_per_connection != MESSAGES_PER_CONNECTION:
        return limits
    return limits._replace(mails=min(limits.mails, _EXIM_TAKES))
