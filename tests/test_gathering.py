"""What comes while a write is on its way leaves together in the next one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from relay.gathering import Gathering


@dataclass
class Item:
    name: str
    size: int = 0


class Writes:
    """Groups as they are begun; the test says when each has ended."""

    def __init__(self, *, flights: int = 1, octets: int = 100, apart: float = 0.0) -> None:
        self.begun: list[str] = []
        self.gathering = Gathering(self.begin, flights=flights, octets=octets, apart=apart)

    def begin(self, group: list[Item]) -> None:
        self.begun.append("".join(item.name for item in group))

    def add(self, names: str, size: int = 0) -> None:
        for name in names:
            self.gathering.add(Item(name, size))


async def test_one_turn_of_the_loop_is_one_group() -> None:
    """What is added in it leaves at its end, and not before."""
    writes = Writes()
    writes.add("ab")
    assert not writes.begun
    await asyncio.sleep(0)
    assert writes.begun == ["ab"]


async def test_what_comes_during_a_write_waits_for_it() -> None:
    """It is one group, however many turns it took to come."""
    writes = Writes()
    writes.add("a")
    await asyncio.sleep(0)
    for name in "bcd":
        writes.add(name)
        await asyncio.sleep(0)
    assert writes.begun == ["a"]
    assert not writes.gathering.is_empty
    writes.gathering.landed()
    assert writes.begun == ["a", "bcd"]
    assert writes.gathering.is_empty


@pytest.mark.parametrize(
    ("sizes", "begun"),
    [
        ({"a": 40, "b": 40, "c": 40}, ["ab", "c"]),
        ({"a": 500, "b": 1}, ["a", "b"]),
        ({"a": 100, "b": 0, "c": 1}, ["ab", "c"]),
    ],
)
async def test_a_group_is_not_too_large(sizes: dict[str, int], begun: list[str]) -> None:
    """It ends before the limit, and one item that alone is larger goes alone."""
    writes = Writes(flights=9)
    for name, size in sizes.items():
        writes.add(name, size)
    await asyncio.sleep(0)
    assert writes.begun == begun


async def test_so_many_flights_at_once() -> None:
    """Two writes are on their way; the third leaves when one of them has ended, well or not."""
    writes = Writes(flights=2, octets=1)
    writes.add("abcd", 1)
    await asyncio.sleep(0)
    assert writes.begun == ["a", "b"]
    writes.gathering.landed()
    assert writes.begun == ["a", "b", "c"]


async def test_a_drain_ends_when_all_has_been_written() -> None:
    """Also for several that drain, and with more that comes meanwhile."""
    writes = Writes()
    await writes.gathering.drain()
    writes.add("a")
    drains = [asyncio.ensure_future(writes.gathering.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    writes.add("b")
    writes.gathering.landed()
    await asyncio.sleep(0)
    assert not any(drain.done() for drain in drains)
    writes.gathering.landed()
    async with asyncio.timeout(10):
        await asyncio.gather(*drains)
    assert writes.begun == ["a", "b"]


async def test_groups_apart_are_larger_unless_somebody_waits() -> None:
    """The first leaves at once; what comes behind it waits for its time, for who hurries, or for the end."""
    writes = Writes(apart=3600)
    writes.add("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert writes.begun == ["a"]
    writes.gathering.landed()
    for name in "bcd":
        writes.add(name)
        await asyncio.sleep(0)
    assert writes.begun == ["a"]
    writes.gathering.hurry()
    writes.add("e")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert writes.begun == ["a", "bcde"]
    writes.add("f")
    writes.gathering.hurry()  # while a write is under way
    assert writes.begun == ["a", "bcde"]
    writes.gathering.landed()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert writes.begun == ["a", "bcde", "f"]
    writes.add("g")
    writes.gathering.landed()
    draining = asyncio.create_task(writes.gathering.drain())
    await asyncio.sleep(0)
    assert writes.begun == ["a", "bcde", "f", "g"]
    writes.gathering.landed()
    await draining


async def test_a_group_that_nobody_hurries_leaves_when_its_time_comes() -> None:
    """Nothing waits for the next item."""
    writes = Writes(apart=0.01)
    for name in "ab":
        writes.add(name)
        async with asyncio.timeout(60):
            while writes.begun[-1:] != [name]:
                await asyncio.sleep(0.001)
        writes.gathering.landed()
