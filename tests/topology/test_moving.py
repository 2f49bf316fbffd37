"""Who has moved, in Redis and in a host's copy: every generation whole, and nothing that Redis loses moves anybody."""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from relay import private_files
from relay.ledger import keys
from relay.ledger.audit import Act
from relay.mail.address_keys import lookup_keys
from relay.routing import moved_copy
from relay.routing.moved_copy import NOBODY, MovedMap, follow
from relay.topology import moving
from relay.topology.moved import MapState, MapStep, MovedEntry
from relay.topology.moving import Lost, NotFollowed
from relay.topology.state import Unreadable

ACT = Act("move", who="test")


def move(client: redis.Redis, to: str | None, *wanted: str, known: int = 0) -> MapState:
    """Move these, None for back; whatever was seen before is what is there now."""
    seen, _ = moving.entries(client, wanted)
    changes = {key: MovedEntry(to, by="test") if to else None for key in wanted}
    state, taken = moving.commit(client, changes, seen, known, ACT)
    assert not taken
    return state


def servers(found: MovedMap, *wanted: str) -> list[str]:
    return [(found.find([key]) or ("", ""))[1] for key in wanted]


def test_a_batch_is_one_generation_and_back(redis_client: redis.Redis, tmp_path: Path) -> None:
    """The copy follows step by step, from whatever generation, and counts are right in Redis and here."""
    first = move(redis_client, "new", "a@x", "b@x", "@y")
    held, trouble = follow(redis_client, tmp_path, NOBODY)
    assert (held.state, trouble, dict(held.servers)) == (first, "", {"new": 3})
    move(redis_client, None, "a@x")
    move(redis_client, "third", "b@x", "c@x")
    last = move(redis_client, "new", "a@x")
    assert (last.generation, last.count, last.servers) == (4, 4, {"new": 2, "third": 2})
    after, trouble = follow(redis_client, tmp_path, held)
    assert (after.state, trouble) == (last, "")
    assert servers(after, "a@x", "b@x", "c@x", "@y", "d@x") == ["new", "third", "third", "new", ""]
    assert servers(held, "a@x", "b@x", "c@x") == ["new", "new", ""], "a snapshot never changes"
    assert dict(after.servers) == last.servers == dict(moved_copy.load(tmp_path).servers)
    assert dict(after.everything()) == dict(moving.everything(redis_client))
    assert len(redis_client.xrange(keys.AUDIT)) == 4


def test_many_generations_at_random_end_alike(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Three hosts that follow at different times, one of them from nothing: all have the same map."""
    chance = random.Random(7)
    names = [f"u{n}@x" for n in range(60)]
    hosts: list[tuple[Path, MovedMap]] = [(tmp_path / name, NOBODY) for name in ("often", "seldom", "never")]
    for turn in range(150):
        move(redis_client, chance.choice(["new", "third", None]), *chance.sample(names, chance.randrange(1, 9)))
        for n, (place, held) in enumerate(hosts):
            if n == 0 or (n == 1 and turn % 120 == 0):
                hosts[n] = place, follow(redis_client, place, held)[0]
    found = [follow(redis_client, place, held) for place, held in hosts]
    assert [trouble for _, trouble in found] == ["", "", ""]
    there = dict(moving.everything(redis_client))
    state, _ = moving.state(redis_client)
    assert state is not None
    for made, _ in found:
        assert (dict(made.everything()), made.state, dict(made.servers)) == (there, state, dict(state.servers))
    assert state.count == len(there)


def test_a_large_map_is_looked_up_in_its_file(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers without the rows in memory, from a file made of many changes, which is closed to others."""
    monkeypatch.setattr(moved_copy, "IN_MEMORY", 5)
    monkeypatch.setattr(moved_copy, "_MOST_CHANGES", 4)
    held = NOBODY
    for n in range(20):
        move(redis_client, "new" if n % 3 else "third", f"u{n}@x", f"u{n + 1}@x")
        held, _ = follow(redis_client, tmp_path, held)
    assert held.rows is None
    assert held.database is not None
    there = dict(moving.everything(redis_client))
    assert {key: held.find([key]) for key in there} == {key: (key, entry.server) for key, entry in there.items()}
    assert held.find(["nobody@x", "u1@x"]) == ("u1@x", there["u1@x"].server)
    assert held.find(["\udcff@x", *lookup_keys("postmaster", fold=True)]) is None
    files = list((tmp_path / "moved").iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert len([path for path in files if path.suffix == ".db"]) == 1


def losses(client: redis.Redis) -> Iterable[str]:
    """Lose the map in one way after the other."""
    everything = {name: client.dump(name) for name in (keys.MOVES, keys.MOVES_STATE, keys.MOVES_LOG)}
    yield "nothing"
    client.flushall()
    yield "flushed"
    for name, data in everything.items():
        client.restore(name, 0, data, replace=True)
    move(client, "third", "other@x")  # whoever did not know of generation 2
    yield "restored, and somebody went on"
    client.delete(keys.MOVES_STATE)
    client.rpush(keys.MOVES_STATE, "x")
    yield "another type of key"
    client.set(keys.MOVES_STATE, "\x1b[31m" + "x" * 10_000)
    yield "nonsense"


def test_what_redis_loses_moves_nobody(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Flushed, restored to an older one, damaged: the copy holds and says why; move refuses until repair."""
    move(redis_client, "new", "a@x")
    ways = losses(redis_client)
    assert next(ways) == "nothing"
    last = move(redis_client, "new", "b@x")
    held, _ = follow(redis_client, tmp_path, NOBODY)
    for way in ways:
        after, trouble = follow(redis_client, tmp_path, held)
        assert after is held, way
        assert f"it keeps generation {last.generation} of who has moved" in trouble, way
        assert trouble.isprintable()
        if way != "restored, and somebody went on":
            with pytest.raises(Lost):
                moving.commit(redis_client, {"c@x": MovedEntry("new")}, {}, last.generation, ACT)
    fresh, _ = follow(redis_client, tmp_path, NOBODY)
    assert fresh.state == last, "also after a restart"
    redis_client.delete(keys.MOVES_STATE)
    state = moving.repair(redis_client, held.state, held.everything(), last.generation, ACT)
    assert (state.generation, state.count) == (last.generation + 1, 3), "and who was moved later is not forgotten"
    after, trouble = follow(redis_client, tmp_path, held)
    assert (after.state, trouble, servers(after, "a@x", "b@x", "other@x")) == (state, "", ["new", "new", "third"])
    other, trouble = follow(redis_client, tmp_path / "another host", NOBODY)
    assert (other.state, trouble) == (state, "")
    assert move(redis_client, None, "a@x", known=state.generation).generation == state.generation + 1


def test_a_new_map_in_an_empty_redis_moves_nobody_either(redis_client: redis.Redis, tmp_path: Path) -> None:
    """Somebody who knew nothing begins anew, and overtakes: it does not follow from what the host has."""
    move(redis_client, "new", "a@x")
    move(redis_client, "new", "b@x")
    held, _ = follow(redis_client, tmp_path, NOBODY)
    redis_client.flushall()
    for n in range(5):
        move(redis_client, "third", f"c{n}@x")
        after, trouble = follow(redis_client, tmp_path, held)
        assert after is held
        assert "it keeps generation 2" in trouble
    redis_client.delete(keys.MOVES_LOG)
    assert follow(redis_client, tmp_path, held)[0] is held, "nor without the log"


def test_who_is_quicker_is_not_overwritten_unseen(redis_client: redis.Redis) -> None:
    """Two operators at once: the same address belongs to the first, who moves others loses nothing."""
    move(redis_client, "new", "a@x")
    seen: dict[str, MovedEntry] = {}
    state, taken = moving.commit(redis_client, {"a@x": MovedEntry("third"), "b@x": MovedEntry("third")}, seen, 1, ACT)
    assert (list(taken), state.count) == (["a@x"], 2)
    assert "test has moved it to new meanwhile" in taken["a@x"]
    assert servers_of(redis_client) == {"a@x": "new", "b@x": "third"}
    same, taken = moving.commit(redis_client, {"a@x": MovedEntry("new")}, {}, 1, ACT)
    assert (taken, same) == ({"a@x": ""}, state), "what somebody else has done as it is wanted is no trouble"


def servers_of(client: redis.Redis) -> dict[str, str]:
    return {key: entry.server for key, entry in moving.everything(client)}


DAMAGED = (
    b"", b"new", b"[]", b'["new"]', b'["new", "x", "", ""]', b'["new", NaN, "", ""]', b'["../x", 0, "", ""]', b"{}",
    b'[["new"], 0, "", ""]', b'["new", 0, 7, ""]', b"\xff\xfe", b'["new", 0, "", ""' + b" " * 9000 + b"]", b"[" * 5000,
)  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=lambda data: repr(data[:20]))
def test_a_damaged_entry_is_one_line_and_keeps_nobody_else(
    redis_client: redis.Redis, tmp_path: Path, data: bytes
) -> None:
    """It is taken as the host has it; where it has none it is no entry. Moving that address again mends it."""
    move(redis_client, "new", "a@x", "b@x")
    held, _ = follow(redis_client, tmp_path / "knows", NOBODY)
    with pytest.raises(Unreadable):
        MovedEntry.from_json(data)
    redis_client.hset(keys.MOVES, "a@x", data)
    move(redis_client, "third", "c@x")
    redis_client.delete(keys.MOVES_LOG)
    for place, before, expected in (("knows", held, "new"), ("fresh", NOBODY, "")):
        made, trouble = follow(redis_client, tmp_path / place, before)
        assert servers(made, "a@x", "b@x", "c@x") == [expected, "new", "third"]
        assert "a@x" in trouble
        assert trouble.isprintable()
        assert len(trouble) < 300
    move(redis_client, "new", "a@x")
    made, trouble = follow(redis_client, tmp_path / "fresh", made)
    assert servers(made, "a@x") == ["new"]


def test_a_damaged_copy_is_read_again(redis_client: redis.Redis, tmp_path: Path) -> None:
    """A note or file that makes no sense, or is gone, costs one reading of the whole map, and no tracebacks."""
    move(redis_client, "new", "a@x")
    for name, data in (("map.json", b"{"), ("map.json", b'{"state": 7}'), ("*.db", b"no database"), ("*.db", None)):
        follow(redis_client, tmp_path, NOBODY)
        for path in (tmp_path / "moved").glob(name):
            path.unlink() if data is None else path.write_bytes(data)
        assert moved_copy.load_or_tell(tmp_path) is NOBODY
        made, trouble = follow(redis_client, tmp_path, NOBODY)
        assert (servers(made, "a@x"), trouble) == (["new"], "")


def test_a_state_folder_that_cannot_be_written_costs_memory_only(redis_client: redis.Redis, tmp_path: Path) -> None:
    """The process follows all the same, and says so."""
    move(redis_client, "new", "a@x")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    made, trouble = follow(redis_client, blocked, NOBODY)
    assert servers(made, "a@x") == ["new"]
    assert "cannot be written" in trouble
    move(redis_client, None, "a@x")
    made, trouble = follow(redis_client, blocked, made)
    assert (servers(made, "a@x"), len(made)) == ([""], 0)


def test_what_the_disk_does_not_take_is_written_once_it_does(
    redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is told until the copy is there, fills with no leavings, and no restart goes back behind it."""
    move(redis_client, "new", *(f"u{n}@x" for n in range(50)))
    first, _ = follow(redis_client, tmp_path, NOBODY)
    last = move(redis_client, "new", "b@x")
    write, refused = private_files.write, ["map.json"]

    def full(where: Path, name: str, data: bytes) -> None:
        if any(name.endswith(end) for end in refused):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(where, name, data)

    monkeypatch.setattr(private_files, "write", full)
    monkeypatch.setattr(moved_copy, "_MOST_CHANGES", 0)
    monkeypatch.setattr(redis_client, "lrange", lambda *_: [])  # so that the whole map is read
    held = first
    for _ in range(3):
        held, trouble = follow(redis_client, tmp_path, held)
        assert (held.state, "cannot be written: No space left" in trouble) == (last, True)
        assert len(list((tmp_path / "moved").glob("*.db"))) == 1
    assert moved_copy.load(tmp_path).state == first.state
    refused.clear()
    held, trouble = follow(redis_client, tmp_path, held)
    assert (trouble, moved_copy.load(tmp_path).state) == ("", last)
    assert servers(moved_copy.load(tmp_path), "u7@x", "b@x") == ["new", "new"]


def test_a_copy_that_is_removed_is_written_whole_with_the_next_change(
    redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Nothing refers to a file that is not there any more."""
    move(redis_client, "new", "a@x", "b@x")
    held, _ = follow(redis_client, tmp_path, NOBODY)
    for path in (tmp_path / "moved").iterdir():
        path.unlink()
    last = move(redis_client, None, "a@x")
    _, trouble = follow(redis_client, tmp_path, held)
    found = moved_copy.load(tmp_path)
    assert (trouble, found.state, servers(found, "a@x", "b@x")) == ("", last, ["", "new"])


def test_no_move_goes_ahead_of_one_that_is_not_followed(redis_client: redis.Redis) -> None:
    """Whoever has waited for a generation to be followed does not make the next but one."""
    first = move(redis_client, "new", "a@x")
    second = move(redis_client, "new", "b@x")
    wanted = {"c@x": MovedEntry("new")}
    with pytest.raises(NotFollowed):
        moving.commit(redis_client, wanted, {}, 0, ACT, first.generation)
    assert moving.entries(redis_client, ["c@x"]) == ({}, {})
    assert moving.commit(redis_client, wanted, {}, 0, ACT, second.generation)[0].generation == 3


def test_stored_forms_are_read_back() -> None:
    state = MapState(3, "id", "line", 1, 2, 5.5, "me", {"new": 2})
    assert MapState.from_json(state.to_json()) == state
    step = MapStep(3, "id", "before", {"a@x": MovedEntry("new", 1.0, "me", "note"), "b@x": None})
    assert MapStep.from_json(step.to_json()) == step


def test_a_generation_far_away_is_read_as_a_whole(redis_client: redis.Redis, tmp_path: Path) -> None:
    """No work is done for each generation that Redis only claims to have had, however high the number."""
    first = move(redis_client, "new", "a@x")
    held, _ = follow(redis_client, tmp_path, NOBODY)
    for generation in (first.generation + 101, 2**39):
        claimed = replace(first, generation=generation, id=f"id{generation}")
        redis_client.set(keys.MOVES_STATE, claimed.to_json())
        assert moving.steps(redis_client, held.state, claimed) is None
        held, trouble = follow(redis_client, tmp_path, held)
        assert (trouble, held.state, servers(held, "a@x")) == ("", claimed, ["new"])
