"""What a server announces in its EHLO reply: its extensions, and among them its limits, LIMITS (RFC 9422)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class ServerLimits(NamedTuple):
    """The most transactions on a connection, RCPT commands and recipient domains in a transaction."""

    mails: int = sys.maxsize
    recipients: int = sys.maxsize
    domains: int = sys.maxsize


UNLIMITED = ServerLimits()
_OLD_AUTH = re.compile("^auth=", re.IGNORECASE)  # as some servers wrote it before RFC 2554
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
