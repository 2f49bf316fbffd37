"""Redis's clock as a process knows it: no clock that is set makes anything wait, end or grow old that should not."""

from __future__ import annotations

import math
import random

import pytest
import redis

from relay.ledger import keys
from relay.ledger.redis_clock import RedisClock, last_look, note_look, pull_in, shorten
from relay.mail.ids import ALPHABET, IdSource, made_at

HOUR = 3600.0


class Host:
    """A host's two clocks and Redis's, each set by the test."""

    def __init__(self) -> None:
        self.uptime, self.wall, self.redis = 1000.0, 5e8, 1e9
        self.clock = RedisClock(monotonic=lambda: self.uptime, wall=lambda: self.wall)

    def passes(self, seconds: float) -> None:
        self.uptime += seconds
        self.wall += seconds
        self.redis += seconds

    def hears(self, after: float = 0.0) -> float:
        """Ask Redis, whose answer takes so many seconds."""
        asked_at = self.uptime
        self.passes(after)
        return self.clock.hear(self.redis - after / 2, asked_at)

    def time(self) -> tuple[int, int]:
        return int(self.redis), int(self.redis % 1 * 1e6)


def test_the_time_is_redis_whatever_this_host_says() -> None:
    """Before an answer it is the host's own; afterwards the host's clock, and its steps, change nothing."""
    host = Host()
    assert host.clock.now() == host.wall
    assert host.hears() == 0.0
    for step in (-2 * HOUR, 300.0, 86400.0):
        host.wall += step
        host.passes(15)
        assert host.clock.now() == pytest.approx(host.redis)
        assert host.hears() == 0.0


@pytest.mark.parametrize("step", [-2 * HOUR, -30.0, 30.0, 300.0, 2 * HOUR])
def test_a_step_of_redis_is_found_once(step: float) -> None:
    """It is told by its length, at the next answer; what is slow or slewed is none."""
    host = Host()
    host.hears()
    host.passes(60)
    host.redis += 0.2
    assert host.hears(after=8) == 0.0
    host.redis += step
    assert host.hears() == pytest.approx(step, abs=0.5)
    assert host.clock.now() == pytest.approx(host.redis)
    assert host.hears() == 0.0


def test_time_that_did_not_pass_makes_nothing_older() -> None:
    """What was before a step forward is as old as the seconds that really passed; what came after is not touched."""
    host = Host()
    host.hears()
    first = host.redis
    host.passes(100)
    host.redis += 10 * HOUR
    host.hears()
    host.passes(50)
    second = host.redis
    host.redis += 300
    host.hears()
    host.passes(10)
    assert host.clock.age(first) == pytest.approx(160, abs=1)
    assert host.clock.age(second) == pytest.approx(10, abs=1)
    for seconds, at in (
        (5, host.redis - 5),
        (30, second - 20),
        (59, second - 49),
        (110, first + 50),
        (200, first - 40),
    ):
        assert host.clock.ago(seconds) == pytest.approx(at, abs=1)
    host.redis -= 3 * HOUR
    host.hears()
    assert host.clock.age(host.redis - 7) == pytest.approx(7, abs=1)


def test_what_nobody_has_watched_is_not_known_to_have_passed() -> None:
    """At a start: since the last look at it the clock may have been set; what it went back is found all the same."""
    host = Host()
    assert host.clock.ask(host, last=host.redis - 40 * 86400) == 0.0
    assert host.clock.age(host.redis - 41 * 86400) == pytest.approx(86400, abs=1)
    assert host.clock.ask(host, last=host.redis - 9 * 86400) == 0.0  # only the first time
    other = Host()
    assert other.clock.ask(other, last=other.redis + 2 * HOUR) == pytest.approx(-2 * HOUR)
    assert Host().clock.ask(Host()) == 0.0


@pytest.mark.parametrize("damage", [b"soon", b"", b"1e400", b"-5", b"nan"])
def test_the_last_look_is_data(redis_client: redis.Redis, damage: bytes) -> None:
    """What makes no sense there is no look, and what is too long ago or ahead harms nothing."""
    assert last_look(redis_client) == 0.0
    note_look(redis_client, 1234.5678)
    assert last_look(redis_client) == 1234.568
    redis_client.hset(keys.LEDGER, "looked", damage)
    clock = RedisClock()
    step = clock.ask(redis_client, last_look(redis_client))
    assert math.isfinite(step)
    assert math.isfinite(clock.age(clock.now() - 60))


def test_times_come_nearer_and_never_go_farther(redis_client: redis.Redis) -> None:
    """By what the clock went back, and never beyond the most; what is due, or has left, stays so."""
    times = {"due": 90.0, "soon": 130.0, "later": 7300.0, "far": 90000.0, "never": math.inf}
    redis_client.zadd("times", times)
    assert pull_in(redis_client, "times", 100.0, by=7200.0, most=3600.0) == 4
    found = {member.decode(): at for member, at in redis_client.zrange("times", 0, -1, withscores=True)}
    assert found == {"due": 90.0, "soon": 100.0, "later": 100.0, "far": 3700.0, "never": 3700.0}
    assert pull_in(redis_client, "times", 100.0, most=3600.0) == 0
    assert pull_in(redis_client, "nothing", 100.0, by=5.0, most=10.0) == 0


def test_keys_that_end_live_no_longer_than_they_were_meant_to(redis_client: redis.Redis) -> None:
    """A life that the clock, or somebody, has made longer or endless is cut; shorter and missing ones are let be."""
    redis_client.set("long", "1", ex=7320)
    redis_client.set("short", "1", ex=50)
    redis_client.set("endless", "1")
    shorten(redis_client, ["long", "short", "endless", "missing"], 120)
    shorten(redis_client, [], 120)
    assert 115 <= redis_client.ttl("long") <= 120
    assert redis_client.ttl("short") <= 50
    assert 115 <= redis_client.ttl("endless") <= 120


def test_no_id_comes_twice_while_a_clock_goes_back() -> None:
    """An id that comes again would be a message written over another; they also stay in order."""
    wall = [1e9]
    source = IdSource(clock=lambda: wall[0])
    made = []
    # More at once than are counted in a millisecond.
    for step, count in ((0.0, 500), (0.001, 500), (-7200.0, 35_000), (0.001, 500), (7199.9, 500), (0.2, 500)):
        wall[0] += step
        made += [source.next() for _ in range(count)]
    assert made == sorted(set(made))
    assert {i[9:13] for i in made} == {source.owner}
    assert set("".join(made)) <= set(ALPHABET)
    assert made_at(made[-1]) == pytest.approx(wall[0], abs=10)


@pytest.mark.parametrize("seed", range(20))
def test_slow_answers_are_no_step(seed: int) -> None:
    """However long Redis takes, and on whichever way: nothing is said to be set, and the time is as good as known."""
    source = random.Random(seed)
    uptime = 1000.0
    clock = RedisClock(monotonic=lambda: uptime, wall=lambda: 5e8)
    best = math.inf
    for _ in range(200):
        there, back = (source.choice((0.0, 0.001, 0.5, 2.0, 30.0)) * source.random() for _ in range(2))
        asked_at = uptime
        uptime += there
        said = uptime + 1e9
        uptime += back
        assert clock.hear(said, asked_at) == 0.0
        best = min(best, there + back)
        assert abs(clock.now() - uptime - 1e9) <= best / 2 + 1e-5
        uptime += source.random()


@pytest.mark.parametrize("step", [-3600.0, -5.0, 5.0, 3600.0])
@pytest.mark.parametrize("slow", [0.0, 2.0])
def test_a_step_behind_slow_answers(step: float, slow: float) -> None:
    """It is seen by the next answer that is prompt, and by a slow one where it is longer than that took."""
    uptime = 1000.0
    clock = RedisClock(monotonic=lambda: uptime, wall=lambda: 5e8)
    for _ in range(3):
        asked_at = uptime
        uptime += slow
        assert clock.hear(asked_at + 1e9, asked_at) == 0.0
    found = clock.hear(uptime + 1e9 + step, uptime)
    assert found == pytest.approx(step, abs=slow / 2 + 1e-5)
    assert clock.now() == pytest.approx(uptime + 1e9 + step)
