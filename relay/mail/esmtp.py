"""The ESMTP parameters of MAIL and RCPT that are passed on, and the commands written with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

# Parameter -> the extension that defines it. Any other parameter gets 555 (RFC 5321 4.1.1.11).
MAIL_EXTENSIONS: Mapping[str, str] = {
    "SIZE": "SIZE",
    "BODY": "8BITMIME",
    "SMTPUTF8": "SMTPUTF8",
    "RET": "DSN",
    "ENVID": "DSN",
    "AUTH": "AUTH",
    "REQUIRETLS": "REQUIRETLS",
    "MT-PRIORITY": "MT-PRIORITY",
    "HOLDFOR": "FUTURERELEASE",
    "HOLDUNTIL": "FUTURERELEASE",
}
has_control = re.compile(rb"[\x00-\x1f\x7f]").search  # of a command line, which that might end
RCPT_EXTENSIONS: Mapping[str, str] = {"NOTIFY": "DSN", "ORCPT": "DSN"}


def value(parameters: Iterable[str], name: str) -> str | None:
    """Return the value of a parameter, "" if it has none, None if it is absent."""
    for parameter in parameters:
        key, _, text = parameter.partition("=")
        if key.upper() == name:
            return text
    return None


def command_line(verb: str, address: str, parameters: Collection[str]) -> bytes:
    """Return a MAIL FROM or RCPT TO command without CRLF; the inverse of ``parse_path``."""
    line = f"{verb}:<{address}>"
    return (" ".join((line, *parameters)) if parameters else line).encode("utf-8", "surrogateescape")
