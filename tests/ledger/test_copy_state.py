"""What Redis holds of a copy's attempts is data: whatever it says, the copy is tried or listed, with a reason."""

from __future__ import annotations

import json

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from relay.ledger import copy_state, keys
from relay.ledger.copy_state import Attempt, CopyState
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.scripted_server import ScriptedServer
from workers.delivery.courier import Courier
from workers.upkeep.sweep import Sweeper

GOOD = {"a": 2, "t": 1, "s": 1.5, "o": [0], "h": [[1.0, "450 later"]]}
WRONG = [
    b"\xff\xfe",
    b"no line end",
    b"job\n",
    b"job\nnull",
    b"job\n[]",
    b"job\n" + b"[" * 100_000,
    b"job\n" + json.dumps({**GOOD, "h": [[0, "x" * 100]] * 20_000}).encode(),
    *(
        b"job\n" + json.dumps({**GOOD, **change}).encode()
        for change in (
            {"a": "2"},
            {"a": -1},
            {"a": 1e300},
            {"a": True},
            {"t": None},
            {"s": "now"},
            {"s": 1e300},
            {"o": [-1]},
            {"o": ["0"]},
            {"o": "0"},
            {"o": [0.5]},
            {"h": "x"},
            {"h": [["x", "y"]]},
            {"h": [[1e30, "y"]]},
            {"h": [[1, 2]]},
            {"h": [[1]]},
        )
    ),
    b'job\n{"a":1,"t":1,"s":NaN}',
    b'job\n{"a":1,"t":1,"s":Infinity}',
]


@pytest.mark.parametrize("data", WRONG)
def test_garbage_is_a_state_with_a_reason(data: bytes) -> None:
    """Nobody is taken for served by what cannot be read, and the line says what is wrong."""
    state = CopyState.from_wire(data)
    assert (state.owed, state.last_reply) == (None, copy_state.UNREADABLE)
    assert CopyState.from_wire(state.to_wire()) == state


@given(st.binary(max_size=200))
def test_no_octets_raise(data: bytes) -> None:
    """Reading raises for nothing."""
    CopyState.from_wire(data)
    CopyState.from_wire(b"job\n" + data)


def test_what_was_right_stays() -> None:
    """A good state reads as before, and so does one that Lua has written: an empty list is {} there."""
    state = CopyState("job-1", 3, 2, 1764252000.125, (0, 2), (Attempt(1764252001.5, "450 later"),))
    assert CopyState.from_wire(state.to_wire()) == state
    assert CopyState.from_wire(b'job\n{"a":1,"t":0,"s":0,"o":{},"h":{}}') == CopyState("job", 1, owed=())


def test_replies_are_kept_up_to_a_length() -> None:
    """A server that talks without end fills no Redis: a copy's history is bounded in number and in length."""
    state = CopyState()
    for _ in range(50):
        state = state.tried(1.0, "x" * 100_000)
    assert len(state.to_wire()) < 21 * (copy_state.REPLY + 50)


@pytest.mark.parametrize("data", WRONG[:4] + WRONG[7:9])
async def test_garbage_is_listed_and_delivered(
    redis_client: redis.Redis, redis_url: str, scripted: type[ScriptedServer], data: bytes
) -> None:
    """A pending copy with such a state is delivered, a failed one is listed; nothing crashes on the way."""
    contents = Contents(redis_client, "new")
    server = scripted()
    waiting, bad = contents.pending(), contents.pending()
    contents.fail(bad)
    redis_client.hset(keys.OWN + "new", waiting, data)
    redis_client.hset(keys.FAILURE + "new", bad, data)
    assert [copy.id for copy in listed_copies.waiting(redis_client)] == [waiting]
    assert [copy.reply for copy in listed_copies.failures(redis_client)] == [copy_state.UNREADABLE]
    Sweeper(redis_client, settings()).sweep(thorough=True)
    courier = Courier(settings(), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver(CopyState.from_wire(data).job or "job", [waiting])
    await courier.drain()
    assert len(server.messages) + contents.connection.zcard(keys.PENDING + "new") == 1
