"""Every relay process says once a second that it lives; whoever reads that believes nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import redis

from relay.ledger import keys
from relay.topology import heartbeats
from relay.topology.heartbeats import Pulse
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until


def beat(client: redis.Redis, pulse: Pulse) -> None:
    with client.pipeline(transaction=False) as pipe:
        pulse.ask(pipe)
        pulse.take(pipe.execute(raise_on_error=False)[0])


def shift(client: redis.Redis, process: str, seconds: float) -> None:
    """Have a process beaten so many seconds earlier than it has."""
    found = json.loads(client.hget(keys.RELAYS, process) or b"")
    client.hset(keys.RELAYS, process, json.dumps({**found, "at": found["at"] - seconds}))


def test_a_beat_is_read_as_it_was_meant(redis_client: redis.Redis) -> None:
    """All fields come back; what stands in the ledger comes with the beat, in the same round trip."""
    pulse = Pulse("host-a /var/lib/x", "relay-2", 7)
    pulse.epoch, pulse.primary, pulse.generation, pulse.trouble, pulse.in_old = 3, "new", 5, "does not know it", 2
    pulse.down = ["a", "no name"]
    redis_client.set(keys.TOPOLOGY, "a")
    redis_client.set(keys.INTENT, b"\xff")
    beat(redis_client, pulse)
    (found,) = heartbeats.read(redis_client)
    assert (found.process, found.name, found.pid) == ("host-a /var/lib/x relay-2", "relay-2", 7)
    assert (found.epoch, found.primary, found.generation) == (3, "new", 5)
    assert (found.trouble, found.in_old, found.is_alive) == ("does not know it", 2, True)
    assert found.down == ("a",)
    assert found.label.endswith("/2")
    assert (pulse.topology, pulse.intent) == ("a", "\\xff")


def test_who_is_silent_is_dead_and_then_forgotten(redis_client: redis.Redis) -> None:
    """Ten seconds, by Redis's clock; a day, and the reconciler takes what is left away."""
    for n in (1, 2, 3):
        beat(redis_client, Pulse("host /x", f"relay-{n}", n))
    shift(redis_client, "host /x relay-2", 11)
    shift(redis_client, "host /x relay-3", 90_000)
    redis_client.hset(keys.RELAYS, b"\xffjunk", b"junk")
    found = heartbeats.read(redis_client)
    assert [(b.name, b.is_alive) for b in found] == [("relay-1", True), ("relay-2", False)]
    assert [b.name for b in heartbeats.living(found)] == ["relay-1"]
    assert heartbeats.forget_old(redis_client) == 2
    assert redis_client.hlen(keys.RELAYS) == 2


def test_a_start_forgets_who_is_not_started_any_more(redis_client: redis.Redis) -> None:
    """A place with fewer processes than before has no dead ones; other places are left alone."""
    for place, name in (("host /x", "relay-1"), ("host /x", "relay-2"), ("host /xy", "relay-2"), ("b /x", "relay-2")):
        beat(redis_client, Pulse(place, name, 1))
    heartbeats.forget(redis_client, "host /x relay-1", ["relay-1"])
    assert {b.process for b in heartbeats.read(redis_client)} == {"host /x relay-1", "host /xy relay-2", "b /x relay-2"}
    heartbeats.forget(redis_client, "host /x relay-1")
    assert len(heartbeats.read(redis_client)) == 2


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"at": 1e999}',
        b'{"at": true, "pid": "x"}',
        b'{"at": 1, "pid": -1, "epoch": 0, "generation": 0, "in_old": 0}',
    ],
)
def test_what_makes_no_sense_is_no_process(redis_client: redis.Redis, value: bytes) -> None:
    """A damaged or hostile entry is passed over, and the others are read."""
    redis_client.hset(keys.RELAYS, "x relay-9", value)
    beat(redis_client, Pulse("host /x", "relay-1", 1))
    assert [b.name for b in heartbeats.read(redis_client)] == ["relay-1"]


def test_text_of_a_process_moves_no_cursor(redis_client: redis.Redis) -> None:
    """What a process says of itself is shown printable, and not at any length."""
    pulse = Pulse("host /x", "relay-1", 1)
    pulse.trouble = "\x1b[2J" + "x" * 100_000
    beat(redis_client, pulse)
    (found,) = heartbeats.read(redis_client)
    assert found.trouble.isprintable()
    assert len(found.trouble) < 1000


def test_another_type_of_key_stops_nothing(redis_client: redis.Redis) -> None:
    """Whoever has put something else there: the beat brings nothing back, and there are no processes."""
    pulse = Pulse("host /x", "relay-1", 1)
    redis_client.set(keys.RELAYS, "x")
    redis_client.rpush(keys.TOPOLOGY, "x")
    beat(redis_client, pulse)
    assert (pulse.topology, pulse.intent) == ("", "")
    assert heartbeats.read(redis_client) == []


def test_an_error_in_place_of_an_answer_says_nothing() -> None:
    """A Redis that runs no script has not said that nobody was promoted."""
    pulse = Pulse("host /x", "relay-1", 1)
    for answer in (redis.ResponseError("no"), None, [], [b"x"]):
        pulse.take(answer)
        assert pulse.topology is None
    pulse.take([b"", b"", b""])
    assert pulse.topology == ""


def test_a_full_redis_can_still_be_read(redis_factory: Callable[..., RedisServer]) -> None:
    """A Redis that takes no more writes tells the topology all the same."""
    with redis_factory().client() as client:
        client.set(keys.TOPOLOGY, "it")
        client.config_set("maxmemory", 1)
        pulse = Pulse("host /x", "relay-1", 1)
        beat(client, pulse)
        assert pulse.topology == "it"


def test_the_processes_of_a_relay(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Each beats once a second; the successor of a dead one takes its place, and who stops is no dead process."""
    relay = product(primary=primary.address, backups=[backup.address], settings={"smtp.processes": "2"})
    with redis.Redis.from_url(relay.redis_url) as client:

        def found() -> dict[str, int]:
            return {b.name: b.pid for b in heartbeats.living(heartbeats.read(client))}

        wait_until(lambda: len(found()) == 2)
        before = found()
        relay.child("relay-1").kill()
        wait_until(lambda: found().get("relay-1") not in {None, before["relay-1"]})
        assert found()["relay-2"] == before["relay-2"]
        relay.child("relay-2").kill()
        assert relay.stop() == 0
    relay.start()
    with redis.Redis.from_url(relay.redis_url) as client:
        wait_until(lambda: set(found()) == {"relay-1", "relay-2"})
        assert all(b.version for b in heartbeats.read(client))


def test_a_stopped_relay_leaves_no_sign(
    product: Callable[..., Product], primary: ScriptedServer, redis_url: str, redis_client: redis.Redis
) -> None:
    """A planned stop is no death: nobody waits ten seconds to hear that it is one."""
    relay = product(primary=primary.address, command="relay", redis_url=redis_url)
    wait_until(lambda: heartbeats.read(redis_client))
    assert relay.stop() == 0
    assert heartbeats.read(redis_client) == []
