"""What taking a message and keeping its copies needs, looked at now: for /readyz.

Redis, the ledger, who is held, the relay's port and the spool; each look has a deadline and none raises.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from relay import private_files
from relay.config.model import Settings
from relay.ledger import archive, changes, overview
from relay.ledger.continuity import warning
from relay.ledger.monitor import STOP_AT
from relay.mail.text import count, printable
from relay.monitoring import routes, topology
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.probes import probe_redis
from relay.redisio.clients import sync_client
from relay.topology import decisions

SPOOL = "spool"
HELD = "destination "
LEDGER = "ledger"
MEMORY = "redis memory"
PROCESSES = "processes"
_DISK_SECONDS = 2.0  # for a small file
_writing = threading.Lock()  # held while a file is written
_PORT_SECONDS = 3.0  # for a greeting on the relay's port
_TOLD_SECONDS = 86400.0  # for so long a ledger that has changed is a warning
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where to reach such a listener)


def of(settings: Settings, *, relaying: bool) -> list[ProbeResult]:
    """Look at all that taking a message and keeping its copies needs, now."""
    findings = asyncio.run(probe_redis(settings))
    usable = all(finding.ok for finding in findings)
    findings += _ledger(settings, usable=usable)
    if relaying:
        patience = _PORT_SECONDS + settings.smtp.greeting_delay
        first = b"PROXY UNKNOWN\r\n" if settings.smtp.proxy_protocol else b""
        findings += [_port(host, port, patience, first) for host, port in settings.smtp.addresses]
        findings += spool(settings)
        findings += routes.refused_tables(settings)
        if not usable:  # else it is read from there again, and written
            findings += routes.unusable_map(settings)
    return findings


def of_processes(still: Sequence[str]) -> list[ProbeResult]:
    """Say which processes of this installation live and do nothing."""
    text = f"no sign of life from {', '.join(still)}: killed when that lasts for five minutes"
    return [ProbeResult(PROCESSES, False, text)] if still else []


def _ledger(settings: Settings, *, usable: bool) -> list[ProbeResult]:
    """Say what the ledger tells, up to where it stops answering: a Redis that hangs is waited for once."""
    found: list[ProbeResult] = []
    try:
        with sync_client(settings.redis, settings.redis.timeout_seconds, retries=0) as client:
            if usable:
                found += _memory(client)
            found.append(_change(client))
            found += topology.about_topology(settings, decisions.view(client))
            found += _held(client)
    except (RedisError, OSError) as error:
        if usable:  # else the probe of Redis has said it
            found.append(ProbeResult(LEDGER, False, f"cannot be asked: {printable(str(error))}"))
    return found


def _memory(client: Redis) -> list[ProbeResult]:
    """Say how full Redis is: nothing where it has no bound."""
    used, limit = archive.memory(client)
    if not limit:
        return []
    text = f"{used / limit:.0%} of maxmemory is used"
    if used <= STOP_AT * limit:
        return [ProbeResult(MEMORY, True, text)]
    failed = sum(row.failed for row in overview.summary(client))
    text += ": new copies go to the spool. Raise maxmemory, or let the backups take what waits"
    text += f"; {count(failed, 'failed copy', 'failed copies')}: failed retry, failed drop" if failed else ""
    return [ProbeResult(MEMORY, False, text)]


def _change(client: Redis) -> ProbeResult:
    """Say whether the ledger turned out lately to be another than it was."""
    change = overview.change(client)
    ago = changes.now(client) - change.at
    if not change.cause or ago > _TOLD_SECONDS:
        return ProbeResult(LEDGER, True, "is the one that was here before")
    return ProbeResult(LEDGER, False, f"{warning(change.cause)} ({ago:.0f} s ago)")


def _held(client: Redis) -> list[ProbeResult]:
    """Say which destinations an operator holds."""
    rows = overview.summary(client)
    return [ProbeResult(f"{HELD}{row.destination}", False, f"held {row.reason}") for row in rows if row.held]


def _port(host: str, port: int, patience: float, first: bytes = b"") -> ProbeResult:
    """Connect as a client: the kernel alone would take a connection also where no process accepts it any more."""
    subject = f"relay {host or '*'}:{port}"
    try:
        with socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=patience) as client:
            client.settimeout(patience)
            client.sendall(first)
            code = client.recv(512)[:3]
            client.sendall(b"QUIT\r\n")
    except OSError as error:
        return ProbeResult(subject, False, f"does not accept: {error.strerror or error}")
    # Any other reply is a living relay's too: it may be set not to talk to this machine.
    living = code.isdigit() and code != b"421"
    return ProbeResult(
        subject, living, "accepts" if living else f"turns clients away ({code.decode('ascii', 'replace')})"
    )


def spool(settings: Settings, *, writes: bool = True) -> list[ProbeResult]:
    """Say whether the spool takes files; unless it ``writes`` one, only as far as the system tells."""
    folder = settings.spool.dir
    if folder is None:
        return []
    place = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return [ProbeResult(SPOOL, False, f"{folder} cannot be written")]
    disk = os.statvfs(place)
    if disk.f_files and not disk.f_favail:
        return [ProbeResult(SPOOL, False, f"no inode is free at {folder}: no file can be made")]
    free = disk.f_bavail * disk.f_frsize
    least = settings.spool.min_free
    if free < max(least, 1):
        return [ProbeResult(SPOOL, False, f"{free} bytes are free at {folder}, spool.min_free is {least}")]
    if writes and place == folder and (trouble := _trouble_writing(folder)):
        return [ProbeResult(SPOOL, False, f"{folder} cannot be written: {trouble}")]
    return [ProbeResult(SPOOL, True, f"{folder} can be written")]


def _trouble_writing(folder: Path) -> str:
    """Write a small file as a message is written; return what keeps it from the disk (an error, a quota), or ""."""
    came: queue.SimpleQueue[str] = queue.SimpleQueue()
    hangs = f"the disk has not taken a file within {_DISK_SECONDS:g} s"
    if not _writing.acquire(timeout=_DISK_SECONDS):  # who asks at the same time waits for their turn
        return hangs

    def write() -> None:
        try:
            private_files.write(folder, "probe", b"x")
            (folder / "probe").unlink(missing_ok=True)  # another generation may look, too
        except OSError as error:
            came.put(error.strerror or str(error))
        else:
            came.put("")
        finally:
            _writing.release()

    try:
        threading.Thread(target=write, name="probe of the spool", daemon=True).start()
    except RuntimeError as error:  # no thread can be started
        _writing.release()
        return str(error)
    try:
        return came.get(timeout=_DISK_SECONDS)
    except queue.Empty:
        return hangs
