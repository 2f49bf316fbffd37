"""Parses the attributes of XFORWARD (for the log) and XCLIENT (for access rules too), which name the original client.

Attributes are (name, value) pairs, decoded, with Postfix's names: NAME, ADDR, PORT, PROTO, HELO, IDENT, SOURCE. An
invalid one raises BadAttribute. Only clients in smtp.xforward_networks may send them; peer.py checks that, and
client/xforward.py sends them to the other servers.
"""

from __future__ import annotations

import ipaddress
import re

from relay.mail.addresses import plain_address

XFORWARD = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")
XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT", "REVERSE_NAME")
_UNKNOWN = ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
_LONGEST = 255  # characters of a value
_XTEXT = re.compile(r"[!-*,-<>-~]|\+[0-9A-F]{2}", re.IGNORECASE)
_ENCODED = re.compile(r"\+([0-9A-Fa-f]{2})")


class BadAttribute(ValueError):
    """An attribute that is unknown, repeated or has an invalid value."""


def read_attributes(argument: str, known: tuple[str, ...]) -> dict[str, str]:
    """Read ``NAME=value ...`` with xtext decoded; the value "" means unknown. Raises BadAttribute."""
    found: dict[str, str] = {}
    for word in filter(None, argument.split(" ")):
        name, equals, value = word.partition("=")
        name = name.upper()
        if name not in known or not equals or name in found:
            raise BadAttribute(f"bad attribute {name[:32]}")
        found[name] = "" if value.upper() in _UNKNOWN else _checked(name, _decoded(value))
    if not found:
        raise BadAttribute("no attribute")
    return found


def _decoded(value: str) -> str:
    if not value or "".join(_XTEXT.findall(value)) != value:
        raise BadAttribute("a value is no xtext")
    octets = _ENCODED.sub(lambda found: chr(int(found[1], 16)), value).encode("latin-1")
    try:
        return octets.decode("utf-8")
    except UnicodeDecodeError:
        raise BadAttribute("a value is not UTF-8") from None


def _checked(name: str, value: str) -> str:
    """Return a value in the form in which it is kept. Raises BadAttribute."""
    if len(value) > _LONGEST or not value.isprintable():
        raise BadAttribute(f"bad {name} value")
    if name in ("ADDR", "DESTADDR"):
        return read_address(value)
    if name in ("PORT", "DESTPORT"):
        fine = value.isascii() and value.isdigit() and len(value) <= 5 and int(value) <= 65535
    elif name == "PROTO":
        value, fine = value.upper(), value.upper() in ("SMTP", "ESMTP")
    elif name == "SOURCE":
        value, fine = value.upper(), value.upper() in ("LOCAL", "REMOTE")
    else:
        fine = " " not in value or name in ("HELO", "LOGIN")
    if not fine:
        raise BadAttribute(f"bad {name} value")
    return value


def read_address(value: str) -> str:
    """Return the plain address of ``192.0.2.1`` or ``IPv6:2001:db8::1``. Raises BadAttribute."""
    text = value[5:] if value[:5].upper() == "IPV6:" else value
    try:
        return plain_address(ipaddress.ip_address(text))
    except ValueError:
        raise BadAttribute("bad ADDR value") from None
