"""What options must agree on with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from relay.config.destinations import is_loopback, is_own_address
from relay.config.types import listen_addresses
from relay.mail.addresses import Network

OPEN_RELAY = (
    "{} makes this an open relay, through which everybody can send mail to any domain: name your clients' networks, "
    "or set smtp.allowed_domains; users who log in (smtp.users_file) may connect from anywhere without this"
)


def disagreements(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key of each option that does not agree with another, and what is wrong."""
    first, longest, give_up = (values[f"retry.{name}"] for name in ("first", "longest", "give_up"))
    if first > longest:
        yield "retry.first", "expected no more than retry.longest"
    if longest > give_up:
        yield "retry.longest", "expected no more than retry.give_up"
    if values["spool.dir"] is None and not values["relay.require_durable_copies"]:
        yield "spool.dir", "without a spool relay.require_durable_copies must be true"
    if values["redis.sentinels"] and values["redis.url"].startswith("unix:"):
        yield "redis.url", "with redis.sentinels it must be redis:// or rediss://"
    if values["redis.replicas"] and not values["redis.url"]:
        yield "redis.replicas", "the embedded Redis has none; set redis.url or redis.sentinels"
    for host, port in listen_addresses(values["status.listen"]):
        if is_own_address(host or "127.0.0.1", port, own_addresses(values)):
            yield "status.listen", "is the same address as smtp.listen"
    yield from _door(values)


def _door(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Check the client side: TLS needs a certificate, and the relay must not be open."""
    for host, port in listen_addresses(values["smtp.listen_tls"]):
        if is_own_address(host or "127.0.0.1", port, listen_addresses(values["smtp.listen"])):
            yield "smtp.listen_tls", "is the same address as smtp.listen"
    if values["smtp.tls_certificate"] is None:
        for key, asks in (("smtp.tls", "encrypt"), ("smtp.listen_tls", values["smtp.listen_tls"] or None)):
            if values[key] == asks:
                yield key, "needs smtp.tls_certificate"
        if values["smtp.tls_key"] is not None:
            yield "smtp.tls_key", "has a meaning only with smtp.tls_certificate"
    public = values["smtp.proxy_protocol"] or any(not is_loopback(host) for host, _ in own_addresses(values))
    if public and not values["smtp.allowed_domains"]:
        everybody = ", ".join(str(n) for n in values["smtp.allowed_networks"] if _is_everybody(n))
        if everybody:
            yield "smtp.allowed_networks", OPEN_RELAY.format(everybody)


def own_addresses(values: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Return every address that we listen on for mail."""
    return listen_addresses(values["smtp.listen"]) + listen_addresses(values["smtp.listen_tls"])


def _is_everybody(network: Network) -> bool:
    """Return whether a network is so large that it must contain strangers."""
    return network.prefixlen < (8 if network.version == 4 else 16) and not network.is_private
