"""Several relay hosts and one Redis: at each of them mailboxes are moved there and back, decisions made and undone.

All the while mail comes in at all hosts, whose second tries go to another host, and servers hang, refuse and hang up at
every step. With kills, processes, whole hosts and Redis die, too, and hosts are cut off from Redis.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from relay.ledger import keys
from support.mta_in_front import MtaInFront
from support.product import Product
from support.redis_link import RedisLink
from support.redis_servers import RedisServer
from support.route_audit import Audit, acknowledged
from support.route_disturbances import Disturber
from support.route_hosts import NAMES, Hosts, agree, recipients, retry_what_failed
from support.route_operators import Operator, decider, mover
from support.scripted_server import ScriptedServer

MakeLink = Callable[[RedisServer], RedisLink]
_SECONDS = 40.0  # for which mail comes
_BATCHES = 3  # the first two are of one operator each, the third of two, who move it against each other


@pytest.fixture
def link() -> Iterator[MakeLink]:
    """Call it for another way to a Redis."""
    with ExitStack() as ends:

        def make(redis: RedisServer) -> RedisLink:
            # Not below pytest's folder, whose path is too long for a socket.
            folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="smtp-dup-link-")))
            return ends.enter_context(RedisLink(folder / "sock", Path(redis.url.removeprefix("unix://"))))

        yield make


@pytest.mark.long
@pytest.mark.parametrize(("seed", "kills", "decide"), [(1, False, False), (4, True, True)])
@pytest.mark.timeout(400)
def test_nothing_is_lost_and_each_repetition_is_explained(
    product: Callable[..., Product],
    scripted: Callable[..., ScriptedServer],
    redis_factory: Callable[..., RedisServer],
    link: MakeLink,
    tmp_path: Path,
    seed: int,
    kills: bool,
    decide: bool,
) -> None:
    """Every server ends with all that it is owed, all hosts go by the same, and an acknowledged move is followed."""
    count, servers = int(8 * _SECONDS), {name: scripted() for name in NAMES}
    redis = redis_factory()
    links = partial(link, redis) if kills else None
    hosts = Hosts(product, redis, servers, relays=3 if kills else 2, workers=1 + kills, link=links)
    users: list[set[str]] = []
    operators: list[Operator] = []
    for n in range(_BATCHES):
        users.append({f"r{number}@example.com" for number in range(count) if number % _BATCHES == n})
        batch = tmp_path / f"batch-{n}"
        batch.write_text("".join(f"{user}\n" for user in sorted(users[n])))
        for turn in range(1 + (n == _BATCHES - 1)):
            host = hosts.relays[(n + turn) % len(hosts.relays)]
            operators.append(Operator(host, mover(batch), seed + 10 * n + turn, pause=(0.5, 2.0)))
    deciders = [Operator(host, decider(seed + n), seed + n) for n, host in enumerate(hosts.relays[:2]) if decide]
    sender = MtaInFront(
        [relay.smtp_port for relay in hosts.relays],
        range(count),
        recipients,
        seed=seed,
        pace=_SECONDS / count,
        patience=_SECONDS + 120,
    ).start()
    disturber = Disturber(hosts, seed, kills=kills)
    for operator in (*operators, *deciders):
        operator.start()
    end, following = time.monotonic() + _SECONDS, 0.0
    while time.monotonic() < end:
        disturber.look()
        if time.monotonic() >= following:
            following = time.monotonic() + disturber.step()
        time.sleep(0.05)  # as a soak does: disturbances come by the clock
    disturber.end()
    sender.hurry()
    for operator in (*operators, *deciders):
        operator.end()
    sender.join()
    assert not sender.unfinished, sender.unfinished[:3]
    agree(hosts)
    retry_what_failed(hosts)
    audit = Audit(hosts, sender)
    if not decide:
        for operator, batch_of in zip(operators[:2], users, strict=False):
            audit.faults += acknowledged(operator, batch_of, audit, sender)
    assert not audit.faults, f"{audit.faults[:10]}\n{disturber.done}"
    assert audit.counts["accepted"] > count
    with redis.client() as client:
        assert not list(client.scan_iter(keys.MESSAGE + "*")), "a body that nobody needs is left"
