"""A server that mail is delivered to, and its stored form. Frozen; nothing here does I/O."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from relay.mail.ids import is_destination_name
from relay.mail.recipient import Recipient
from relay.mail.stored import parsed, texts
from relay.mail.text import printable

_DNS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,4}|(?:\[[0-9A-Fa-f:.]+\]|[0-9.]+):[1-5][0-9]{4}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
MESSAGES_PER_CONNECTION = 100  # what OpenSMTPD takes by default; an Exim gets fewer, see relay.client.server_limits
MX_PORT = 25  # of a host that DNS names for a domain
CONNECTION_AGE = 300.0  # seconds, as Postfix's smtp_connection_reuse_time_limit
_NUMBERS = {"port", "connections", "messages_per_connection", "connection_age"}  # fields of a destination
_NO_TEXTS = _NUMBERS | {"soft_bounce", "domains"}


@dataclass(frozen=True, slots=True)
class Destination:
    """A server that mail is delivered to: the primary or a backup.

    ``name`` labels it everywhere (settings, queue, metrics); it never holds user information. ``password`` is the
    secret itself, excluded from ``repr`` and from the stored form; ``password_from`` is a reference (``env:NAME``,
    ``file:/path``) that a later process resolves.
    """

    name: str
    host: str
    port: int
    scheme: str = "smtp"  # smtp, smtps, lmtp, or mx: the host is a domain, and DNS has the hosts for its mail
    tls: str = "opportunistic"  # none, opportunistic, encrypt, verify (smtps: TLS from the first byte)
    username: str = ""
    password: str = field(default="", repr=False)
    password_from: str = ""
    domains: tuple[str, ...] = ()  # only recipients in these domains are copied; empty: all
    sender: str = "keep"  # or "null": copies carry the null sender
    soft_bounce: bool = False
    connections: int = 0  # at most this many at once, per worker process; 0: see workers.delivery.retry.Width
    messages_per_connection: int = MESSAGES_PER_CONNECTION  # transactions on one connection, at most; 0: no limit
    connection_age: float = CONNECTION_AGE  # seconds until a connection is not used again; 0: no limit
    ca_file: str = ""
    tls_certificate: str = ""  # client certificate, for a server that requests one
    tls_key: str = ""
    dns: str = ""  # host:port of the DNS server to ask, with mx; "": those of the system

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        if self.scheme == "mx":
            return f"mx:{host}" if self.port == MX_PORT else f"mx:{host}:{self.port}"
        return f"{host}:{self.port}"

    @property
    def queue_name(self) -> str:
        """The RQ queue of this backup."""
        return f"backup-{self.name}"

    def wants(self, recipient: Recipient) -> bool:
        """Return whether this backup gets a copy for this recipient."""
        return not self.domains or recipient.domain in self.domains

    def to_json(self) -> str:
        """Return the stored form, without the password."""
        names = [s for s in self.__slots__ if s != "password" and (s != "dns" or self.dns)]
        return json.dumps({s: getattr(self, s) for s in names}, sort_keys=True)

    @classmethod
    def from_json(cls, data: str | bytes) -> Destination:
        """Read the stored form. Raises ValueError if it is no destination."""
        try:
            record = parsed(data)
            record["domains"] = texts(record.get("domains", []))
            known = {k: v for k, v in record.items() if k in cls.__slots__ and k != "password"}
            found = cls(**known)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"unreadable destination: {printable(str(error))}") from error
        words = [value for key, value in known.items() if key not in _NO_TEXTS]
        fine = (
            is_destination_name(found.name)
            and all(isinstance(value, str) and not _CONTROL.search(value) for value in words)
            and type(found.port) is int
            and 0 <= found.port < 65536  # 0: only the name is known, see relay.ledger.continuity
            and found.scheme in {"smtp", "smtps", "lmtp", "mx"}
            and found.tls in {"none", "opportunistic", "encrypt", "verify"}
            and found.sender in {"keep", "null"}
            and type(found.connections) is int
            and found.connections >= 0
            and type(found.messages_per_connection) is int
            and found.messages_per_connection >= 0
            and type(found.connection_age) in {int, float}
            and 0 <= found.connection_age < float("inf")
            and type(found.soft_bounce) is bool
            and (not found.dns or _DNS.fullmatch(found.dns) is not None)
        )
        if not fine:
            raise ValueError("unreadable destination: a field has not the form that it should")
        return found
