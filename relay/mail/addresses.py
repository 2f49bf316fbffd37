"""IP addresses and networks of clients: parse, compare, and write them in one form. Nothing here raises."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@lru_cache(maxsize=4096)
def parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Parse an IP address; returns None for anything else. Cached: a few clients send most messages."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        return found.ipv4_mapped  # an IPv4 client on a socket for both families
    return found


def within(address: str, networks: tuple[Network, ...]) -> bool:
    """Return whether an IP address is in one of the networks; False for anything that is no address."""
    if not networks:
        return False
    client = parsed(address)
    if client is not None:
        for network in networks:
            if client in network:
                return True
    return False


def plain_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return an address as text: without a zone ("%eth0"), and an IPv4-mapped IPv6 address as IPv4."""
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.IPv6Address(int(address)))
    return str(address)


@lru_cache(maxsize=4096)
def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address."""
    found = parsed(address)
    return found is not None and found.is_loopback


def network_prefix(address: str) -> str:
    """Return the name under which connections from an address are counted: an IPv6 address counts as its /64."""
    client = parsed(address)
    if client is None or client.version == 4:
        return address
    return str(ipaddress.ip_network((client, 64), strict=False))
