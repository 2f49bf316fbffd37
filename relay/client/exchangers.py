"""The hosts that take mail for a domain (RFC 5321 5.1): for a server that is given as ``mx:example.com``.

By preference, random among equals; without an MX the domain itself. A host that is this machine ends the list: mail
would go round in a loop, by way of the mail server in front of us. What DNS says is kept for as long as it says; while
no DNS server can tell, the last good answer goes on to hold. Raises NoExchanger.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
import time
from dataclasses import dataclass
from typing import NamedTuple

from relay import maillog
from relay.client import dns
from relay.client.dns import LookUp, NoAnswer, Server
from relay.client.dns_message import AAAA, MX, A, is_host_name
from relay.client.errors import NoExchanger
from relay.mail.destination import MX_PORT, Destination

_MOST_HOSTS = 20  # of a list: those of the best preference
_LEAST_TTL = 5  # seconds
_LONGEST_TTL = 86400
_AFTER_TROUBLE = 10.0  # seconds until a name is asked for again, of which no server could tell
_MOST_KEPT = 4096  # answers

_UNKNOWN = "4.4.3 The mail servers of the primary's domain cannot be looked up, try again later"
_NO_NAME = "4.4.4 The primary's domain does not exist"
_NULL = "4.4.4 The primary's domain takes no mail"
_NO_ADDRESS = "4.4.4 The primary's domain has no mail server"
_LOOP = "4.4.6 The mail server of the primary's domain is this host: mail would go round in a loop"


class Exchanger(NamedTuple):
    """A host that takes mail for the domain, and its addresses."""

    name: str
    addresses: tuple[str, ...]


@dataclass(slots=True)
class _Kept:
    """What DNS has said, until when it counts (monotonic), and whether nobody could tell since."""

    found: LookUp
    until: float
    is_stale: bool = False


_Key = tuple[str, int, tuple[Server, ...]]
_kept: dict[_Key, _Kept] = {}
_asking: dict[_Key, asyncio.Task[LookUp]] = {}


async def exchangers(destination: Destination, seconds: float) -> list[Exchanger]:
    """Return the hosts to be tried for a destination, in this order, with a deadline. Raises NoExchanger."""
    domain = destination.host.rstrip(".").lower()
    servers = _servers(destination)
    deadline = asyncio.get_running_loop().time() + seconds
    found = await _known(domain, MX, servers, seconds)
    if not found.exists:
        raise NoExchanger("the domain does not exist", _NO_NAME)
    listed = sorted({(record.preference, record.text) for record in found.records})
    if listed and all(not name for _, name in listed):
        raise NoExchanger("the domain takes no mail: it has a null MX", _NULL)
    hosts = [(preference, name) for preference, name in listed if is_host_name(name)] if listed else [(0, domain)]
    random.shuffle(hosts)
    hosts = sorted(hosts, key=lambda host: host[0])[:_MOST_HOSTS]
    left = max(0.0, deadline - asyncio.get_running_loop().time())
    addresses = await asyncio.gather(*(_addresses(name, servers, left) for _, name in hosts))
    own: list[int] = []  # preferences of hosts from which mail would come back to this machine, to its port for mail
    if destination.port == MX_PORT:
        found_of = zip(hosts, addresses, strict=True)
        own = [preference for (preference, _), of_host in found_of if any(map(_is_this_machine, of_host or ()))]
    usable = [
        Exchanger(name, tuple(of_host))
        for (preference, name), of_host in zip(hosts, addresses, strict=True)
        if of_host and (not own or preference < min(own))
    ]
    if usable:
        return usable
    if own:
        raise NoExchanger("the mail server of the domain is this host", _LOOP)
    if addresses and all(of_host is None for of_host in addresses):
        raise NoExchanger("the addresses of its mail servers cannot be looked up", _UNKNOWN)
    raise NoExchanger("the domain has no mail server with an address", _NO_ADDRESS)


def _servers(destination: Destination) -> tuple[Server, ...]:
    if not destination.dns:
        return tuple(dns.servers_of_system())
    host, _, port = destination.dns.rpartition(":")
    return ((host.strip("[]"), int(port)),)


async def _addresses(name: str, servers: tuple[Server, ...], seconds: float) -> list[str] | None:
    """Return the addresses of a host, IPv4 first; None where nobody can tell."""
    found = await asyncio.gather(*(_known(name, kind, servers, seconds) for kind in (A, AAAA)), return_exceptions=True)
    known = [one for one in found if isinstance(one, LookUp)]
    for trouble in found:
        if isinstance(trouble, BaseException) and not isinstance(trouble, NoExchanger):
            raise trouble
    addresses = list(dict.fromkeys(record.text for one in known for record in one.records))
    return addresses if addresses or len(known) == len(found) else None


async def _known(name: str, kind: int, servers: tuple[Server, ...], seconds: float) -> LookUp:
    """Return what DNS says, or has said. Raises NoExchanger."""
    key = (name, kind, servers)
    kept = _kept.get(key)
    if kept is not None and time.monotonic() < kept.until:
        return kept.found
    task = _asking.get(key)
    if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
        task = _asking[key] = asyncio.get_running_loop().create_task(dns.look_up(name, kind, servers, seconds))
        task.add_done_callback(lambda done: _take(key, done))
    try:
        # Others may wait for it, too: who goes away does not end it.
        return await asyncio.wait_for(asyncio.shield(task), seconds + 1)
    except (NoAnswer, TimeoutError) as error:
        if kept is None or not kept.found.exists:
            raise NoExchanger(f"no DNS server can tell: {error or 'no answer in time'}", _UNKNOWN) from error
        return kept.found


def _take(key: _Key, done: asyncio.Task[LookUp]) -> None:
    """Keep what a look-up has found, and the last good answer where it has found out nothing."""
    if _asking.get(key) is done:
        del _asking[key]
    if done.cancelled():
        return
    error, before, now = done.exception(), _kept.get(key), time.monotonic()
    if error is None:
        found = done.result()
        if len(_kept) >= _MOST_KEPT and key not in _kept:
            _kept.pop(next(iter(_kept)))
        _kept[key] = _Kept(found, now + min(max(found.ttl, _LEAST_TTL), _LONGEST_TTL))
    elif before is not None:
        if not before.is_stale:
            maillog.notice("warning", "DNS does not answer, what it has said holds", name=key[0], reason=str(error))
        before.until, before.is_stale = now + _AFTER_TROUBLE, True


def _is_this_machine(address: str) -> bool:
    """Return whether an address is one of this machine: then packets to it come from it. Sends nothing."""
    found = ipaddress.ip_address(address)
    if found.is_loopback or found.is_unspecified:
        return True
    family = socket.AF_INET if found.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return bool(probe.getsockname()[0] == address)
    except OSError:  # no way there
        return False
