"""Probes of what the settings name: can Redis keep a copy for good, does each server answer?

Used by `smtp-dup check` and by /readyz. A probe never raises for trouble with the other side, and each of its steps
has a deadline: whatever happens becomes a ProbeResult in plain words, without secrets.
"""

from __future__ import annotations

import asyncio
import ssl
import time

from redis.asyncio import Redis
from redis.exceptions import BusyLoadingError, RedisError, ResponseError

from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.cockpit.reachability import verify
from relay.config.model import RedisSettings, Settings
from relay.mail import encryption
from relay.mail.destination import Destination
from relay.mail.text import count, printable
from relay.mail.timeouts import Timeouts
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.routes import about_routes, unusable_map
from relay.monitoring.sentinel_probes import probe_replicas, probe_sentinels, probe_settings
from relay.redisio import embedded, versions
from relay.redisio.clients import async_client
from relay.redisio.said import said
from relay.smtpd.credentials import Credentials

# The settings that Redis must have, or a copy can be lost after the relay's 2xx; and how it gets lost.
_MUST_BE = {
    "appendonly": ("yes", "or a restart loses every waiting copy"),
    "appendfsync": ("always", "or a power cut loses copies that were already acknowledged"),
    "no-appendfsync-on-rewrite": ("no", "or copies are not durable while Redis rewrites its file"),
    "maxmemory-policy": ("noeviction", "or Redis deletes waiting copies when its memory is full"),
}
_WORTH_KNOWING = ("SIZE", "PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "CHUNKING", "XFORWARD")


async def probe_all(settings: Settings) -> list[ProbeResult]:
    """Probe Redis and every destination, all at the same time."""
    servers = [(settings.primary, "primary")] if settings.primary else []
    servers += [(backup, f"backup {backup.name}") for backup in settings.backups]
    servers += [(server, f"server {server.name}") for server in settings.servers]
    hostname, timeouts = settings.smtp.domain, settings.relay.timeouts
    found = (probe_credentials(settings), probe_keys(settings))
    door = [finding for finding in found if finding is not None]
    door += await asyncio.to_thread(about_routes, settings)
    door += await asyncio.to_thread(unusable_map, settings)
    async with asyncio.TaskGroup() as group:
        redis = group.create_task(probe_redis(settings))
        others = [
            group.create_task(probe_destination(server, subject, local_hostname=hostname, timeouts=timeouts))
            for server, subject in servers
        ]
    return [*door, *redis.result(), *(task.result() for task in others)]


def probe_credentials(settings: Settings) -> ProbeResult | None:
    """Look whether certificate and users can be used; None where the settings name neither."""
    try:
        credentials = Credentials.load(settings.smtp)
    except OSError as error:
        subject, _, text = str(error).partition(": ")
        return ProbeResult(subject, False, text)
    words = [] if credentials.tls is None else ["the certificate and its key can be used"]
    words += [] if credentials.users is None else [f"{count(len(credentials.users), 'user')} may log in"]
    return ProbeResult("smtp", True, "; ".join(words)) if words else None


def probe_keys(settings: Settings) -> ProbeResult | None:
    """Look whether the key file can be used; None where the settings name none."""
    if settings.storage.key_file is None:
        return None
    try:
        keys = encryption.Keyring(settings.storage.key_file)
    except encryption.BadKeyFile as error:
        return ProbeResult("storage.key_file", False, str(error))
    return ProbeResult("storage.key_file", True, f"new mail is {keys.words}")


# Redis --------------------------------------------------------------------------------------------------------


async def probe_redis(settings: Settings, url: str = "") -> list[ProbeResult]:
    """Look whether Redis answers and keeps what it acknowledges.

    ``url`` stands for settings.redis.url where the embedded Redis runs. The first finding, "redis", says whether it
    can be used at all; the others name one setting each. What cannot be verified is not ok: nobody promised it.
    """
    server = settings.redis.at(url)
    if not server.url:
        return [await asyncio.to_thread(_probe_program, server.program)]
    found = await _probe_server(server)
    if not server.sentinels:
        return found
    rows, replicas = await probe_sentinels(server)
    others = await asyncio.gather(*(probe_settings(server, address, _persistence) for address in replicas))
    return [*found, *rows, *(row for of_one in others for row in of_one)]


def _probe_program(wanted: str) -> ProbeResult:
    """Say which server program `smtp-dup up` would start."""
    try:
        program = embedded.find_server(wanted)
    except embedded.EmbeddedError as error:
        return ProbeResult("redis", False, str(error))
    version = versions.of(program)
    if trouble := versions.too_old(program, version):
        return ProbeResult("redis", False, trouble)
    shown = f"{program} ({version or 'which does not say its version'})"
    return ProbeResult("redis", True, f"redis.url is not set: `smtp-dup up` starts an embedded one, {shown}")


async def _probe_server(server: RedisSettings) -> list[ProbeResult]:
    """Probe the Redis that is written to: the master, where there are Sentinels."""
    patience, shown = server.timeout_seconds, server.shown
    client = async_client(server, patience, retries=0, decode=True)
    try:
        async with asyncio.timeout(patience):
            started = time.monotonic()
            await client.execute_command("PING")
            took = _milliseconds(started)
            first = await _state(client, f"{shown} answers in {took}")
            replicas = await probe_replicas(server, client)
            return [first, *await _persistence(client), *replicas]
    except BusyLoadingError:
        return [ProbeResult("redis", False, f"{shown} is still loading its data")]
    except TimeoutError:
        return [ProbeResult("redis", False, f"{shown} does not answer within {patience:g} s")]
    except (RedisError, OSError) as error:
        return [ProbeResult("redis", False, f"{shown} cannot be used: {printable(said(error))}")]
    finally:
        await client.aclose()


async def _state(client: Redis, answers: str) -> ProbeResult:
    """Say what INFO tells that makes a Redis useless for us, whatever its settings are."""
    try:
        info = await client.info("all")
    except ResponseError:
        return ProbeResult("redis", True, f"{answers} (INFO is refused to us)")
    trouble = ""
    if info.get("role") == "slave":
        trouble = "it is a read-only replica; name the master"
    elif info.get("cluster_enabled"):
        trouble = "it is a Redis Cluster; smtp-dup needs a single server"
    elif info.get("aof_last_write_status", "ok") != "ok":
        trouble = "it cannot write its append-only file; look at its disk and its log"
    name = "Valkey" if info.get("server_name") == "valkey" else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "")
    return ProbeResult("redis", not trouble, f"{answers}, {name} {version}" + (f", but {trouble}" if trouble else ""))


async def _persistence(client: Redis) -> list[ProbeResult]:
    findings = []
    for name, (wanted, because) in _MUST_BE.items():
        subject = f"redis {name}"
        try:
            answer = await client.config_get(name)
        except ResponseError as error:
            text = (
                f"cannot be verified, CONFIG GET is refused ({printable(str(error))}); it must be {wanted}, {because}"
            )
            findings.append(ProbeResult(subject, False, text))
            continue
        found = answer.get(name, "not known to this server")
        if found == wanted:
            findings.append(ProbeResult(subject, True, found))
        else:
            findings.append(ProbeResult(subject, False, f"is {found}; set `{name} {wanted}`, {because}"))
    return findings


# Servers ------------------------------------------------------------------------------------------------------


async def probe_destination(
    destination: Destination, subject: str = "", *, local_hostname: str, timeouts: Timeouts
) -> ProbeResult:
    """Open a session as the relay would, up to and including AUTH, and leave with QUIT.

    A second session finds out whether the certificate would pass "verify" where nobody checks it.
    """
    subject = subject or destination.name
    started = time.monotonic()
    try:
        connection = await connect(destination, local_hostname=local_hostname, timeouts=timeouts)
    except ClientError as error:
        return ProbeResult(subject, False, f"{destination.address} cannot be used: {printable(str(error))}")
    took = _milliseconds(started)
    security = _security(connection)
    offered = [
        f"{name} {connection.extensions[name]}".rstrip() for name in _WORTH_KNOWING if name in connection.extensions
    ]
    await connection.quit(timeout=min(timeouts.connect, 2))
    if security and destination.tls != "verify":
        verified, why, _ = await verify(destination, local_hostname, timeouts)
        if verified is not None:
            security += " (it would pass tls=verify)" if verified else f" (it would not pass tls=verify: {why})"
    words = [
        f"{destination.address} answers in {took}",
        security or "no TLS: mail goes there in plain text",
        f"logged in as {destination.username}" if destination.username else "",
        f"offers {', '.join(offered)}" if offered else "offers no extensions",
    ]
    return ProbeResult(subject, True, printable("; ".join(word for word in words if word)))


def _security(connection: Connection) -> str:
    """Return the TLS version and whether the certificate was checked; "" without TLS."""
    tls = connection._transport.get_extra_info("ssl_object")  # noqa: SLF001 - only to name the version
    if not isinstance(tls, ssl.SSLObject):
        return ""
    return f"{tls.version()}, certificate {'verified' if connection.destination.tls == 'verify' else 'not checked'}"


def _milliseconds(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.0f} ms"
