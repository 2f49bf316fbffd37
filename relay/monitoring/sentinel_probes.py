"""Probes of what a failover needs: Sentinels that agree on a master, replicas that follow it and keep what they have.

One finding for each Sentinel, one for the replicas as the master sees them, one for each replica's settings. Like all
probes they never raise for trouble with the other side, and say what to do about it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from relay.config.model import RedisSettings
from relay.mail.text import printable
from relay.monitoring.probe_result import ProbeResult
from relay.redisio.clients import async_client, sentinel_clients

_SECONDS = 2.0
_LAG_SECONDS = 10  # since a replica last said how far it is
_BEHIND = 16 << 20  # octets


@dataclass(slots=True)
class _View:
    """What one Sentinel sees."""

    address: str
    master: str = ""
    replicas: tuple[str, ...] = ()
    trouble: str = ""


async def probe_sentinels(server: RedisSettings) -> tuple[list[ProbeResult], tuple[str, ...]]:
    """Ask every Sentinel. Returns the findings, and host:port of the replicas that they know."""
    views = await asyncio.gather(*(_view(server, a, c) for a, c in sentinel_clients(server, _SECONDS)))
    masters = Counter(view.master for view in views if view.master)
    agreed = masters.most_common(1)[0][0] if masters else ""
    rows = []
    for view in views:
        trouble = view.trouble
        if not trouble and view.master != agreed:
            trouble = (
                f"says that the master is {view.master}, others say {agreed}: a failover is going on, or it is cut off "
                "from the others; see `sentinel masters` there"
            )
        text = trouble or f"the master is {view.master}"
        rows.append(ProbeResult(f"sentinel {view.address}", not trouble, text))
    replicas = next((view.replicas for view in views if view.master == agreed and view.master), ())
    return rows, replicas


async def _view(server: RedisSettings, address: str, client: Redis) -> _View:
    view = _View(address)
    try:
        async with asyncio.timeout(_SECONDS):
            await _look(server.service, client, view)
    except (RedisError, OSError, TimeoutError) as error:
        why = printable(str(error)) or f"no answer within {_SECONDS:g} s"
        view.trouble = f"cannot be asked: {why}; start it, or mend redis.sentinels: a failover needs most of them"
    finally:
        await client.aclose()
    return view


async def _look(service: str, client: Redis, view: _View) -> None:
    found = cast("dict[str, dict[str, Any]]", await client.sentinel_masters())
    state = found.get(service)
    if state is None:
        known = ", ".join(sorted(found)) or "none"
        view.trouble = f'knows no service "{printable(service)}"; set redis.service to one that it knows: {known}'
        return
    view.master = f"{state['ip']}:{state['port']}"
    replicas = await client.sentinel_slaves(service)
    view.replicas = tuple(f"{r['ip']}:{r['port']}" for r in replicas if not r["is_sdown"])
    if state["is_sdown"] or state["is_odown"]:
        view.trouble = f"does not reach the master {view.master}: see its log, and `sentinel masters`"
        return
    try:
        await client.execute_command("SENTINEL CKQUORUM", service)
    except ResponseError as error:
        view.trouble = f"could not decide on a failover: {printable(str(error))}; start more Sentinels"


async def probe_replicas(server: RedisSettings, client: Redis) -> list[ProbeResult]:
    """Look whether as many replicas follow the master as must, closely. Nothing to say without need of any."""
    subject, wanted = "redis replicas", server.replicas
    if not wanted and not server.sentinels:
        return []
    try:
        info = await client.info("replication")
    except ResponseError as error:
        return [ProbeResult(subject, not wanted, f"cannot be seen, INFO is refused to us ({printable(str(error))})")]
    replicas = [replica for name, replica in info.items() if name.startswith("slave") and isinstance(replica, dict)]
    offset = int(info.get("master_repl_offset", 0))
    slow = [text for r in replicas if (text := _lag(r, offset))]
    good = len(replicas) - len(slow)
    about = f"{good} of {len(replicas)} follow closely" if replicas else "no replica is connected to the master"
    if slow:
        about += f" ({'; '.join(slow)})"
    if good < max(1, wanted):
        text = f"{about}; start or mend one: " + (
            f"redis.replicas is {wanted}, so copies go to the spool until then" if wanted else "there is no failover"
        )
        return [ProbeResult(subject, False, text)]
    rows = [ProbeResult(subject, True, about)]
    if not wanted:
        text = "redis.replicas is 0: a failover loses what was just accepted; set it to the number of replicas"
        rows.append(ProbeResult("redis failover", False, text))
    return rows


def _lag(replica: dict[str, Any], offset: int) -> str:
    """Say what is wrong with a replica as the master sees it, "" when it follows closely."""
    address = f"{replica.get('ip')}:{replica.get('port')}"
    if replica.get("state") != "online":
        return f"{address} is {replica.get('state')}"
    behind = offset - int(replica.get("offset", 0))
    lag = int(replica.get("lag", 0))
    if lag > _LAG_SECONDS or behind > _BEHIND:
        return f"{address} is {behind} octets behind, last heard of {lag} s ago: look at its disk and network"
    return ""


async def probe_settings(
    server: RedisSettings, address: str, look: Callable[[Redis], Awaitable[list[ProbeResult]]]
) -> list[ProbeResult]:
    """Look at the settings of a replica, which are the promise's after a failover. Only what is wrong is told."""
    subject = f"replica {address}"
    host, _, port = address.rpartition(":")
    scheme, _, rest = server.url.partition("://")
    userinfo, at, place = rest.rpartition("@")
    options = place[min((place.find(c) for c in "/?" if c in place), default=len(place)) :]
    url = f"{scheme}://{userinfo}{at}{f'[{host}]' if ':' in host else host}:{port}{options}"
    client = async_client(replace(server, url=url, sentinels=()), _SECONDS, retries=0, decode=True)
    try:
        async with asyncio.timeout(_SECONDS):
            wrong = [found for found in await look(client) if not found.ok]
            return [replace(found, subject=found.subject.replace("redis", subject, 1)) for found in wrong]
    except (RedisError, OSError, TimeoutError) as error:
        why = printable(str(error)) or f"no answer within {_SECONDS:g} s"
        return [ProbeResult(subject, False, f"cannot be used: {why}; after a failover to it nothing could")]
    finally:
        await client.aclose()
