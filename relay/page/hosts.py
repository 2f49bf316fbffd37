"""Under which names browsers may reach the page, and whether a request comes from the page itself.

A foreign name in Host is DNS rebinding: a site whose name suddenly means this machine, and which could then read the
page in its visitor's browser. An address is safe where it is the connection's own. Whether a browser speaks TLS to what
is in front of us is said by the settings, never by a header that anybody could send.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from relay.config.model import StatusSettings
from relay.config.types import split_host_port
from relay.mail.addresses import is_loopback, parsed, plain_address

_AUTHORITY = re.compile(r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Site(NamedTuple):
    """Where a browser believes to be: what an Origin header has to be."""

    authority: str  # name and perhaps port, as in Host
    is_tls: bool

    @property
    def origin(self) -> str:
        return f"http{'s' * self.is_tls}://{self.authority}"


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names that are allowed, each with whether it is behind TLS."""

    names: Mapping[str, bool]

    @classmethod
    def of(cls, settings: StatusSettings) -> Hosts:
        names = dict.fromkeys(_LOCAL, False)
        if settings.address and settings.address[0]:
            names[_name(settings.address[0])] = False
        return cls(names | {_name(host.name): host.is_tls for host in settings.hosts})

    def site(self, authority: str, own_address: str = "") -> Site | None:
        """Return the site of a Host header, None where it is not ours. ``own_address``: the connection's, here."""
        if not _AUTHORITY.fullmatch(authority):
            return None
        try:
            host, _ = split_host_port(authority, 0)
        except ValueError:
            return None
        name = _name(host)
        if name not in self.names and (not parsed(name) or name != _name(own_address)):
            return None
        return Site(authority.lower(), self.names.get(name, False))


def is_same_origin(site: Site, headers: Mapping[str, str]) -> bool:
    """Return whether a POST comes from a page of this site: no other site can make a browser say so.

    A browser sends Origin with every POST, an old one perhaps only Sec-Fetch-Site; where both are there both count.
    """
    origin, fetched_from = headers.get("origin"), headers.get("sec-fetch-site")
    if origin is None and fetched_from is None:
        return False
    return origin in {None, site.origin} and fetched_from in {None, "same-origin"}


def is_off(settings: StatusSettings) -> bool:
    """Return whether there are only the health paths: without users no others than this host's may see the page."""
    return settings.address is None or (settings.users_file is None and is_reached_from_outside(settings))


def address(settings: StatusSettings) -> str:
    """Return the address of the page for a browser, without a path."""
    host, port = settings.address or ("", 0)
    named = next((h for h in settings.hosts if h.is_tls), None) or next(iter(settings.hosts), None)
    if named:
        host, port = named.name, named.port or (0 if named.is_tls else port)
    elif host in {"", "0.0.0.0", "::"}:  # noqa: S104  (all interfaces: this host is one of them)
        host = "localhost"
    host = f"[{host}]" if ":" in host else host
    return f"http{'s' * bool(named and named.is_tls)}://{host}{f':{port}' * bool(port)}"


def is_reached_from_outside(settings: StatusSettings) -> bool:
    """Return whether others than users of this host can connect."""
    if settings.address is None:
        return False
    host, _ = settings.address
    return host != "localhost" and not is_loopback(host)


def _name(host: str) -> str:
    address = parsed(host)
    return plain_address(address) if address else host.lower().removesuffix(".")
