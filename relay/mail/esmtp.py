"""The ESMTP parameters of MAIL and RCPT that are carried, and the commands written with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Which extension carries which parameter. What is not here is answered 555 (RFC 5321 4.1.1.11).
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
RCPT_EXTENSIONS: Mapping[str, str] = {"NOTIFY": "DSN", "ORCPT": "DSN"}


def value(parameters: Iterable[str], name: str) -> str | None:
    """Return the value of a parameter, "" when it has none, None when it is absent."""
    for parameter in parameters:
        key, _, text = parameter.partition("=")
        if key.upper() == name:
            return text
    return None


def command_line(verb: str, address: str, parameters: Iterable[str]) -> bytes:
    """Write MAIL FROM or RCPT TO with a path and its parameters, as ``parse_path`` reads them."""
    return " ".join((f"{verb}:<{address}>", *parameters)).encode("utf-8", "surrogateescape")
