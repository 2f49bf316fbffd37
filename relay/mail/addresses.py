"""IP addresses and networks of clients: parsed, compared, written in one way."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@lru_cache(maxsize=4096)
def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address in its shortest form, None for what is none. The same few ask again for every message."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        return found.ipv4_mapped  # an IPv4 client on a socket for both families
    return found


def within(address: str, networks: tuple[Network, ...]) -> bool:
    """Say whether an IP address is in one of the networks; what is no address is in none."""
    client = parsed(address)
    return client is not None and any(client in network for network in networks)


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return an address as text, an IPv4 client on an IPv6 socket as IPv4, without a zone ("%eth0")."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)


def is_loopback(address: str) -> bool:
    """Say whether an address is some machine's own."""
    found = parsed(address)
    return found is not None and found.is_loopback


def network_prefix(address: str) -> str:
    """Return under which name connections from an address are counted: an IPv6 client has a whole /64 of its own."""
    client = parsed(address)
    if client is None or client.version == 4:
        return address
    return str(ipaddress.ip_network((client, 64), strict=False))
