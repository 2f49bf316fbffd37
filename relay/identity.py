"""Who the client really is, as MTAs tell each other: XFORWARD (for the log) and XCLIENT (for access rules too).

Attributes are (name, value) pairs, decoded, in Postfix's names: NAME, ADDR, PORT, PROTO, HELO, IDENT, SOURCE. What is
unknown is left out. Taken from clients that may say so, told to servers that offer to listen, on both legs. A server
that does not want to know is told nothing; nothing here fails a message.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from relay.connection import ClientError, Connection
from relay.envelope import Envelope, Reply
from relay.sections import parsed

Identity = tuple[tuple[str, str], ...]

XFORWARD = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")
XCLIENT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT", "REVERSE_NAME")
_UNKNOWN = ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
_NOT_TAKEN = (500, 501, 502, 503, 504, 550)  # of XCLIENT itself; other refusals are of the client that it names
_LINE = 510  # octets of a command without CRLF
_LONGEST = 255  # characters of a value
_XTEXT = re.compile(r"[!-*,-<>-~]|\+[0-9A-F]{2}", re.IGNORECASE)
_ENCODED = re.compile(r"\+([0-9A-Fa-f]{2})")


class BadAttribute(ValueError):
    """An attribute that cannot be taken as it stands."""


class NotIntroduced(ClientError):
    """The server knows this connection as another client's, and it cannot be made this one's."""


# What a client says -------------------------------------------------------------------------------------------


def read_attributes(argument: str, known: tuple[str, ...]) -> dict[str, str]:
    """Read ``NAME=value ...``, xtext decoded; the value "" stands for what is unknown. Raises BadAttribute."""
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
    """Return a value in the form that we keep. Raises BadAttribute."""
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
    """Return an address as we write it, of ``192.0.2.1`` or ``IPv6:2001:db8::1``. Raises BadAttribute."""
    text = value[5:] if value[:5].upper() == "IPV6:" else value
    try:
        return plain_address(ipaddress.ip_address(text))
    except ValueError:
        raise BadAttribute("bad ADDR value") from None


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return an address as text, an IPv4 client on an IPv6 socket as IPv4, without a zone ("%eth0")."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)


# What a server is told ----------------------------------------------------------------------------------------


def of_client(address: str, port: int, helo: str, *, extended: bool) -> Identity:
    """Return what we know ourselves of a client; nothing of one on our own machine, which would tell nobody who."""
    if not address or is_loopback(address):
        return ()
    known = [("ADDR", address), ("PORT", str(port) if port else ""), ("PROTO", "ESMTP" if extended else "SMTP")]
    return tuple((name, value) for name, value in (*known, ("HELO", helo), ("SOURCE", "REMOTE")) if value)


def of_envelope(envelope: Envelope) -> Identity:
    """Return whose message this is, for a backup."""
    return envelope.identity or of_client(envelope.client_address, 0, envelope.client_helo, extended=True)


def is_loopback(address: str) -> bool:
    """Say whether an address is some machine's own."""
    found = parsed(address)
    return found is not None and found.is_loopback


def household(address: str) -> str:
    """Return under which name connections from an address are counted: an IPv6 client has a whole /64 of its own."""
    client = parsed(address)
    if client is None or client.version == 4:
        return address
    return str(ipaddress.ip_network((client, 64), strict=False))


def xforward(identity: Identity, connection: Connection) -> list[bytes]:
    """Return the XFORWARD commands for this server, none where it does not offer it. They hold for one transaction."""
    return [] if connection.introduced else _commands("XFORWARD", identity, connection.extensions)


def _xclient(identity: Identity, extensions: Mapping[str, str]) -> list[bytes]:
    """Return the XCLIENT command for this server, if it grants that.

    Never with a loopback address: the server would take the client for a program of its own and trust it.
    """
    address = dict(identity).get("ADDR", "")
    return _commands("XCLIENT", identity, extensions)[:1] if address and not is_loopback(address) else []


def _commands(verb: str, identity: Identity, extensions: Mapping[str, str]) -> list[bytes]:
    offered = extensions.get(verb, "").upper().split()
    lines: list[str] = []
    for name, value in identity:
        if name not in offered:
            continue
        text = f"IPv6:{value}" if name == "ADDR" and ":" in value else value
        word = f"{name}={_encoded(text)}"
        if lines and len(lines[-1]) + 1 + len(word) <= _LINE:
            lines[-1] += f" {word}"
        else:
            lines.append(f"{verb} {word}")
    return [line.encode("ascii") for line in lines]


def _encoded(value: str) -> str:
    octets = value.encode("utf-8", "surrogateescape")
    return "".join(chr(o) if 32 < o < 127 and o not in b"+=" else f"+{o:02X}" for o in octets)


def is_introduced(connection: Connection, identity: Identity) -> bool:
    """Say whether ``introduce`` would have nothing to say."""
    return _introduction(connection, identity) == connection.introduced


def _introduction(connection: Connection, identity: Identity) -> bytes:
    if not identity or connection.destination.username:
        return b""
    lines = _xclient(identity, connection.extensions)
    return lines[0] if lines else b""


async def introduce(connection: Connection, identity: Identity, *, timeout: float) -> Reply | None:
    """Tell a server that grants XCLIENT who the client is, and greet it anew; once for each change on a connection.

    Returns None, or the reply with which the server turns this client away. Raises ClientError, NotIntroduced.
    """
    wanted = _introduction(connection, identity)
    if wanted == connection.introduced:
        return None
    if not wanted:
        raise NotIntroduced("the connection was another client's", stage="XCLIENT")
    reply = await connection.command(wanted, timeout=timeout)
    if not reply.is_positive:
        if connection.introduced or reply.code == 421:
            raise NotIntroduced("XCLIENT was refused", stage="XCLIENT", reply=reply)
        return None if reply.code in _NOT_TAKEN else reply
    connection.introduced = wanted
    hello = b"LHLO " if connection.destination.scheme == "lmtp" else b"EHLO "
    reply = await connection.command(hello + connection.hostname.encode("ascii", "replace"), timeout=timeout)
    if not reply.is_positive:
        raise ClientError("EHLO after XCLIENT was refused", stage="XCLIENT", reply=reply)
    words = [line.partition(" ") for line in reply.lines[1:]]
    connection.extensions = {keyword.upper(): parameters.strip() for keyword, _, parameters in words}
    return None
