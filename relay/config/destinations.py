"""Reads a destination in the settings into a Destination, and checks destinations against each other.

A destination is ``host:port``, a URL with user information, or the fields of a [[backup]] table. Each problem is
returned as (field, text); no text repeats anything that may hold a password, not even a badly escaped one.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from relay.config.options import BACKUP_FIELDS
from relay.config.types import split_host_port
from relay.mail.address_keys import domain_key, is_domain
from relay.mail.destination import MX_PORT, Destination
from relay.mail.ids import is_destination_name
from relay.ownership import fault_of_secret

_DEFAULT_PORTS = {"smtp": 25, "smtps": 465, "lmtp": 24, "mx": MX_PORT}
_MX = re.compile(r"mx:(?!\d+$)(?://)?(?=[^/])", re.IGNORECASE)  # mx:25 is port 25 of a host with that name
_URL_FIELDS = ("tls", "ca_file", "tls_certificate", "tls_key", "password_from", "dns")
_KINDS = {field.key: field.kind for field in BACKUP_FIELDS}

_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound

Faults = list[tuple[str, str]]


def resolve_password(reference: str, environ: Mapping[str, str]) -> str:
    """Return the secret that ``env:NAME`` or ``file:/path`` refers to. Raises ValueError, without the secret."""
    kind, _, where = reference.partition(":")
    if kind == "env" and where:
        if not environ.get(where):
            raise ValueError(f"the variable {where} is not set")
        return environ[where]
    if kind == "file" and where.startswith("/"):
        try:
            fault = fault_of_secret(Path(where))
            secret = Path(where).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {where}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
        if fault:
            raise ValueError(fault)
        if not secret:
            raise ValueError(f"{where} is empty")
        return secret
    raise ValueError("expected env:NAME or file:/absolute/path")


_ESCAPING = "a special character in the user or the password must be percent-encoded (@ / ? # as %40 %2F %3F %23)"


def _split_url(text: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Return (scheme, host, port, username, password) as a dict and the query's fields. Raises ValueError."""
    scheme, rest = _scheme_of(text)
    try:
        parts = urlsplit(f"//{rest}")
        query = parse_qsl(parts.query, keep_blank_values=True)
        userinfo, _, address = parts.netloc.rpartition("@")
        username, _, password = (unquote(p, errors="strict") for p in userinfo.partition(":"))
    except ValueError:
        raise ValueError(_ESCAPING) from None  # the library's own text may repeat the password
    # An @ after a raw / ? or # is the real separator, and the apparent host is a part of the password.
    if "@" in userinfo or "@" in parts.path + parts.fragment or ("@" in parts.query and not userinfo):
        raise ValueError(_ESCAPING)
    if parts.path not in {"", "/"} or parts.fragment:
        raise ValueError("expected nothing after host and port but ?options")
    host, port = split_host_port(address, _DEFAULT_PORTS[scheme])
    if not host or not port:
        raise ValueError("expected host:port with a host and a port from 1 to 65535")
    if "@" in parts.netloc and not username:
        raise ValueError("expected user:password in front of the @, the user is missing")
    if not (username + password).isprintable():
        raise ValueError("the user or the password holds a control character")
    if any(name not in _URL_FIELDS for name, _ in query) or len(dict(query)) != len(query):
        raise ValueError(f"expected no options after the ? but {', '.join(_URL_FIELDS)}, each once")
    parts_of_url = {"scheme": scheme, "host": host.lower(), "port": port, "username": username, "password": password}
    return parts_of_url, dict(query)


def _scheme_of(text: str) -> tuple[str, str]:
    """Return the scheme and what follows it; plain host:port is smtp. Raises ValueError."""
    scheme, mark, rest = text.partition("://")
    if not text.isprintable() or " " in text:
        raise ValueError("expected no spaces or control characters within a destination")
    if is_mx(text):
        return "mx", _of_domain(_MX.sub("", text, count=1))
    if mark and scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError("expected a URL that begins with smtp://, smtps:// or lmtp://, or mx:example.com")
    if mark:
        return scheme.lower(), rest
    if "@" in text:
        raise ValueError("expected host:port; with a user it must be a URL: smtp://user:password@host:port")
    if "/" in text or "?" in text:
        raise ValueError("expected host:port or a URL: smtp://host:port")
    return "smtp", text


def is_mx(text: str) -> bool:
    """Return whether a text names a server by the domain whose mail it takes: mx:example.com."""
    return _MX.match(text) is not None


def _of_domain(text: str) -> str:
    """Return what follows mx:, its domain as DNS has it. Raises ValueError."""
    if "@" in text.partition("?")[0]:
        raise ValueError("expected no user after mx:, since DNS says which hosts would get the password")
    end = min([n for n in map(text.find, ":/?") if n >= 0], default=len(text))
    domain = domain_key(text[:end])
    if not is_domain(domain) or domain.startswith("[") or re.fullmatch(r"[0-9.]+", domain):
        raise ValueError("expected a domain after mx:, such as mx:example.com, whose MX records name the hosts")
    return domain + text[end:]


def default_name(text: str) -> str:
    """Return the name of a server that is given as mx:example.com and nothing else; any other text as it is."""
    if not is_mx(text):
        return text
    try:
        parts, _ = _split_url(text)
    except ValueError:
        return text
    return Destination("", parts["host"], parts["port"], parts["scheme"]).address


def read_destination(
    text: str, table: Mapping[str, object], *, environ: Mapping[str, str], connections: int
) -> tuple[Destination | None, Faults]:
    """Build a Destination from its URL and the other fields of its table.

    Returns the destination, or None if there are faults, and the faults; the field "" is the URL itself.
    """
    faults: Faults = []
    values: dict[str, Any] = {"connections": connections}
    try:
        parts, query = _split_url(text)
    except ValueError as error:
        return None, [("", str(error))]
    for name, value in {**query, **{k: v for k, v in table.items() if v not in (None, "")}}.items():
        if name in query and name in table and table[name] not in (None, ""):
            faults.append((name, "is also given in the URL"))
        try:
            values[name] = _KINDS[name].read(value)
        except ValueError as error:
            faults.append((name, str(error)))
    if faults:
        return None, faults
    values |= parts
    values.setdefault("name", Destination("", parts["host"], parts["port"], parts["scheme"]).address)
    faults = [*_secrets(values, environ), *_transport(values, given="tls" in query or bool(table.get("tls")))]
    if values.get("dns") and values["scheme"] != "mx":
        faults.append(("dns", "has a meaning only with mx:example.com"))
    if not is_destination_name(values["name"]):
        faults.append(("name", "expected letters, digits and . _ : - [ ] only, at most 100"))
    return (None, faults) if faults else (Destination(**values), [])


def _secrets(values: dict[str, Any], environ: Mapping[str, str]) -> Faults:
    """Resolve password_from into ``values``; returns the faults."""
    reference = values.get("password_from", "")
    if not reference:
        if values["username"] and not values["password"]:
            return [("", "expected a password for this user: user:password@ or password_from")]
        return []
    if values["password"]:
        return [("password_from", "the URL holds a password too; give one of them")]
    if not values["username"]:
        return [("password_from", "expected a user in the URL: smtp://user@host:port")]
    try:
        values["password"] = resolve_password(reference, environ)
    except ValueError as error:
        return [("password_from", str(error))]
    return []


def _transport(values: dict[str, Any], *, given: bool) -> Faults:
    """Set the TLS mode and check its fields; returns the faults. By default a password is never sent in the clear."""
    faults: Faults = []
    scheme, ca_file = values["scheme"], values.get("ca_file", "")
    if not given:
        secret = values["username"] or scheme == "smtps"
        values["tls"] = "verify" if ca_file else "encrypt" if secret else "opportunistic"
    tls = values["tls"]
    if scheme == "smtps" and tls in {"none", "opportunistic"}:
        faults.append(("tls", "expected encrypt or verify: smtps:// is TLS from the first byte"))
    if ca_file and tls != "verify":
        faults.append(("ca_file", "has a meaning only with tls = verify"))
    if values.get("tls_certificate") and tls == "none":
        faults.append(("tls_certificate", "has a meaning only with TLS"))
    if values.get("tls_key") and not values.get("tls_certificate"):
        faults.append(("tls_key", "has a meaning only with tls_certificate"))
    for name in ("ca_file", "tls_certificate", "tls_key"):
        if (file := values.get(name, "")) and not Path(file).is_file():
            faults.append((name, f"there is no readable file {file}"))
        elif file and (fault := fault_of_secret(Path(file))):
            faults.append((name, fault))
    return faults


# Between destinations -----------------------------------------------------------------------------------------


def hosts_of(host: str) -> frozenset[str]:
    """Return all equivalent forms of a host: localhost and its addresses are one host."""
    host = host.lower().rstrip(".")
    if host in {"localhost", "localhost.localdomain", "ip6-localhost"}:
        return frozenset({"127.0.0.1", "::1"})
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return frozenset({host})
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    if address.is_unspecified:  # connecting to 0.0.0.0 reaches this machine
        return frozenset({"127.0.0.1" if address.version == 4 else "::1"})
    return frozenset({str(address)})


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a socket that listens on host ("" means all interfaces)."""
    if host in _EVERYWHERE:
        return False
    try:
        return all(ipaddress.ip_address(address).is_loopback for address in hosts_of(host))
    except ValueError:
        return False  # a name, which is not resolved here


def _is_this_machine(host: str) -> bool:
    """Return whether host is an address of this machine, without a DNS query."""
    own = socket.gethostname().lower()
    if host.lower().rstrip(".") in {own, own.partition(".")[0]}:
        return True
    for candidate in hosts_of(host):
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(candidate).version == 6 else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((candidate, 0))  # only an address of this machine can be bound
                return True
        except (ValueError, OSError):
            continue
    return False


def same_server(one: Destination, other: Destination) -> bool:
    """Return whether both are the same host and port, as far as can be known without a DNS query."""
    return (
        (one.scheme == "mx") == (other.scheme == "mx")
        and one.port == other.port
        and bool(hosts_of(one.host) & hosts_of(other.host))
    )


def is_own_address(host: str, port: int, listening: Sequence[tuple[str, int]]) -> bool:
    """Return whether a connection to host:port would reach one of the relay's own listening sockets."""
    for own_host, own_port in listening:
        if own_port != port or port == 0:
            continue
        if own_host in _EVERYWHERE:
            if _is_this_machine(host):
                return True
        elif hosts_of(own_host) & hosts_of(host):
            return True
    return False


def _loop(server: Destination, listening: Sequence[tuple[str, int]]) -> str:
    """Say that mail to a server would come back to us; "" where it would not, as far as can be known here."""
    if server.scheme == "mx":  # at port 25 the relay looks itself: see relay.client.exchangers
        is_ours = server.port != MX_PORT and any(port == server.port for _, port in listening)
        return f"{server.address} is at our own port (smtp.listen): mail would go round in a loop" if is_ours else ""
    if is_own_address(server.host, server.port, listening):
        return f"{server.address} is our own listening address (smtp.listen): mail would go round in a loop"
    return ""


def conflicts(
    primary: Destination | None, backups: Sequence[Destination], listening: Sequence[tuple[str, int]]
) -> Iterator[tuple[int, str]]:
    """Yield (index of the backup, or -1 for the primary; text of the problem)."""
    seen: list[tuple[str, Destination]] = [("the primary", primary)] if primary else []
    if primary and (text := _loop(primary, listening)):
        yield -1, text
    for index, backup in enumerate(backups):
        if text := _loop(backup, listening):
            yield index, text
            continue
        for label, other in seen:
            if same_server(backup, other):
                yield index, f"{backup.address} is the same server as {label}"
                break
            if backup.name.lower() == other.name.lower():
                yield index, f'the name "{backup.name}" is taken by {label}; names must differ'
                break
        seen.append((f"the backup {backup.name}", backup))
