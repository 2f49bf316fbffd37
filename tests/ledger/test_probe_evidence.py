"""What a probe has found, as it is kept for `ready`: numbers, a few names, and nothing that makes no sense."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import redis

from relay.ledger import keys, probe_evidence
from relay.ledger.probe_evidence import LISTED, REFUSALS, ProbeEvidence
from relay.mail import encryption
from support.hostile_values import RAW

NOW = 1_795_796_640.0
FOUND = ProbeEvidence(
    NOW - 60, "alice", "list", exist=7, missing=2, refused=1, put_off=1, left=4, accepted=7, domains=2,
    why="new broke off", reply="550 5.7.1 no", examples=("ann@a.example", "bob@a.example"),
)  # fmt: skip


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_it_is_read_as_it_was_told(connection: redis.Redis) -> None:
    """By kind; that of a route or that of all mail, whichever is newer. Names are sealed where mail is."""
    probe_evidence.tell(connection, "new", LISTED, "", FOUND)
    assert probe_evidence.read(connection, "new", "", NOW) == {LISTED: FOUND}
    assert probe_evidence.read(connection, "old", "", NOW) == {}
    of_route = replace(FOUND, at=NOW - 30)
    probe_evidence.tell(connection, "new", LISTED, "shop", of_route)
    probe_evidence.tell(connection, "new", REFUSALS, "", FOUND)
    assert probe_evidence.read(connection, "new", "shop", NOW) == {LISTED: of_route, REFUSALS: FOUND}
    assert probe_evidence.read(connection, "new", "", NOW)[LISTED] == FOUND
    probe_evidence.tell(connection, "new", LISTED, "", replace(FOUND, at=NOW))
    assert probe_evidence.read(connection, "new", "shop", NOW)[LISTED].at == NOW
    stored = b"".join(connection.hvals(keys.PROBED + "new"))
    assert (b"ann@a.example" in stored) == (not encryption.is_on())


def test_it_is_bounded(connection: redis.Redis) -> None:
    """Whatever a server says, and however many do not exist."""
    long = replace(FOUND, why="\x1b" * 9000, reply="x" * 9000, examples=tuple(f"{n}{'y' * 900}@a" for n in range(99)))
    probe_evidence.tell(connection, "new", LISTED, "", long)
    found = probe_evidence.read(connection, "new", "", NOW)[LISTED]
    assert (len(found.examples), len(found.why), found.why.isprintable()) == (20, 400, True)
    assert len(connection.hget(keys.PROBED + "new", LISTED)) < 32_768


@pytest.mark.parametrize(
    "change",
    [{"exist": -1}, {"exist": 1.5}, {"at": 0}, {"at": NOW + 3600}, {"accepted": 99}, {"open_domains": 3}, {"left": "x"},
     {"said": None}, {"said": "no seal"}, {"said": {"why": 1, "reply": "", "examples": []}}, {"domains": 1e300}],
)  # fmt: skip
def test_what_makes_no_sense_is_evidence_of_nothing(connection: redis.Redis, change: dict[str, Any]) -> None:
    """Not a pass, whatever somebody writes there."""
    probe_evidence.tell(connection, "new", LISTED, "", FOUND)
    stored = json.loads(connection.hget(keys.PROBED + "new", LISTED))
    connection.hset(keys.PROBED + "new", LISTED, json.dumps({**stored, **change}))
    assert probe_evidence.read(connection, "new", "", NOW) == {}


def test_what_is_none_at_all(connection: redis.Redis) -> None:
    """No JSON, another type of key."""
    for value in RAW:
        connection.hset(keys.PROBED + "new", LISTED, value)
        assert probe_evidence.read(connection, "new", "a route\n", NOW) == {}
    connection.set(keys.PROBED + "old", "x")
    assert probe_evidence.read(connection, "old", "", NOW) == {}
