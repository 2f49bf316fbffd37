"""What a decision means on a host, and what is stored of it: names, roles, epochs, and nothing that is believed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis

from relay.config.loader import Settings, load
from relay.ledger import keys
from relay.ledger.audit import Act, acts
from relay.topology import decisions, remembered, roles
from relay.topology.moved import MapState
from relay.topology.state import Decision, Intent, Topology, Unreadable


def settings(*backups: str, primary: str = "a=a.example:25", **more: str) -> Settings:
    flags = {"relay.destination_primary": primary, "relay.destination_backups": ",".join(backups)}
    return load(flags | {key.replace("__", "."): value for key, value in more.items()}, {}, ())


def topology(primary: str, epoch: int = 1, previous: str = "a") -> Topology:
    return Topology(Decision(epoch, primary, by="alice", at=5.5, reason="why"), Decision(epoch - 1, previous))


THREE = settings("b=b.example:25", "c=c.example:25")


def test_the_former_primary_takes_the_place_of_the_new_one() -> None:
    """All others keep theirs, and no server is left out: each gets every message in any epoch."""
    for name in "abc":
        found = roles.decided(THREE, topology(name))
        assert found
        assert found.primary.name == name
        assert {found.primary.name, *(b.name for b in found.backups)} == {"a", "b", "c"}
    found = roles.decided(THREE, topology("b"))
    assert found
    assert [(b.name, b.sender) for b in found.backups] == [("a", "null"), ("c", "keep")]
    assert roles.backups_now(THREE, topology("b")) == found.backups
    assert roles.backups_now(THREE, None) == THREE.backups == roles.as_settings_say(THREE).backups


def test_a_host_that_does_not_know_the_new_primary() -> None:
    """It goes on as its settings say, also with a name that differs by a letter's case."""
    for name in ("d", "B"):
        assert roles.decided(THREE, topology(name)) is None
        assert roles.backups_now(THREE, topology(name)) == THREE.backups
        assert "do not name it: mail goes to a" in roles.disagreement(THREE, topology(name))
    assert "although the settings name a" in roles.disagreement(THREE, topology("b"))
    assert roles.disagreement(THREE, topology("a")) == roles.disagreement(THREE, None) == ""


@pytest.mark.parametrize(
    ("primary", "old", "why"),
    [("b", "a", ""), ("d", "a", "name d"), ("b", "z", "name z"), ("b", "", ""), ("a", "b", "")],
)
def test_what_keeps_a_host_from_preparing(primary: str, old: str, why: str) -> None:
    """Its settings must name both servers."""
    found = roles.objection(THREE, Intent("x", 1, primary, old, "", 0, 10))
    assert (why in found) if why else not found


def test_a_server_for_some_domains_is_no_primary(tmp_path: Path) -> None:
    """Unless it is the primary by the settings: then there are no domains."""
    (tmp_path / "settings.toml").write_text('[[backup]]\nname = "b"\nurl = "b.example:25"\ndomains = ["x.example"]\n')
    found = load({"relay.destination_primary": "a=a.example:25"}, {}, (tmp_path,))
    assert "domains" in roles.objection(found, Intent("x", 1, "b", "a", "", 0, 10))


def test_stored_forms_come_back() -> None:
    """As they were, in both forms."""
    assert Topology.from_json(topology("b").to_json()) == topology("b")
    intent = Intent("1f", 7, "b", "", "bob", 3.25, 10.0)
    assert Intent.from_json(intent.to_json()) == intent


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1}, {"epoch": 1.5}, {"epoch": True}, {"epoch": 1 << 60}, {"epoch": "1"}, {"epoch": None},
        {"primary": "../x"}, {"primary": ""}, {"primary": 5}, {"primary": "x" * 101}, {"backups": "b"},
        {"backups": [1]}, {"backups": ["a b"]}, {"at": 1e999}, {"at": "x"}, {"by": 5}, {"previous": None},
        {"previous": []}, {"previous": {"epoch": 0}},
    ],
)  # fmt: skip
def test_a_stored_form_that_is_none(change: dict[str, object]) -> None:
    """Each field is what it must be, or there is no decision at all."""
    stored = json.loads(topology("b").to_json())
    with pytest.raises(Unreadable):
        Topology.from_json(json.dumps({**stored, **change}))
    for name in stored.keys() - {"by", "at", "reason"}:
        with pytest.raises(Unreadable):
            Topology.from_json(json.dumps({n: v for n, v in stored.items() if n != name}))


def test_words_of_a_stored_form_are_shown_safely() -> None:
    """Who may write to Redis may not move an operator's cursor."""
    stored = {**json.loads(topology("b").to_json()), "by": "\x1b[2Jroot", "reason": "x" * 5000}
    found = Topology.from_json(json.dumps(stored)).now
    assert found.by.isprintable()
    assert len(found.reason) <= 300


def test_a_lower_epoch_is_never_remembered_over_a_higher(tmp_path: Path) -> None:
    """Whoever of the host's processes writes last; a damaged file is none, and is replaced."""
    assert remembered.load(tmp_path) is None
    for epoch, kept in ((2, 2), (1, 2), (3, 3), (2, 3)):
        remembered.save(tmp_path, topology("b", epoch))
        assert remembered.load(tmp_path).epoch == kept
    (tmp_path / "topology.json").write_bytes(b"\xff" * 100)
    assert remembered.load(tmp_path) is None
    remembered.save(tmp_path, topology("b", 1))
    assert remembered.load(tmp_path) == topology("b", 1)


def test_the_file_of_somebody_else_is_none(tmp_path: Path) -> None:
    """A link leads nowhere."""
    (tmp_path / "other").write_text(topology("b").to_json())
    (tmp_path / "topology.json").symlink_to(tmp_path / "other")
    assert remembered.load(tmp_path) is None


def test_a_decision_and_its_record_are_one(redis_client: redis.Redis) -> None:
    """What somebody else has changed since it was looked at is never overwritten, and then nothing is recorded."""
    act = Act("promote", before="a", after="b")
    seen = decisions.view(redis_client)
    first = decisions.commit(redis_client, seen, Decision(1, "b", ("a",)), Decision(0, "a"), act)
    assert decisions.topology(redis_client) == (first, "")
    with pytest.raises(decisions.Overtaken):
        decisions.commit(redis_client, seen, Decision(1, "c"), Decision(0, "a"), act)
    redis_client.set(keys.TOPOLOGY, topology("c", 9).to_json())
    with pytest.raises(decisions.Overtaken, match="alice promoted c"):
        decisions.commit(redis_client, seen, Decision(2, "b"), Decision(0, "a"), act)
    assert len(list(acts(redis_client))) == 1


def test_nobody_ends_the_intent_of_another_by_mistake(redis_client: redis.Redis) -> None:
    """Who withdraws names it; who cancels ends whichever there is, also one that makes no sense."""
    mine = decisions.propose(redis_client, 1, "b", "a", 60)
    assert decisions.withdraw(redis_client, Intent("other", 1, "b", "a", "", 0, 60)) is None
    assert decisions.view(redis_client).intent == mine
    assert decisions.withdraw(redis_client, mine) == mine
    assert decisions.withdraw(redis_client) is None
    redis_client.set(keys.INTENT, "nonsense")
    decisions.withdraw(redis_client)
    assert not redis_client.exists(keys.INTENT)


@pytest.mark.parametrize("number", [2**40, 2**53 - 1, 2**53, 10**30])
def test_a_number_so_high_that_the_next_may_be_none_is_not_believed(number: int) -> None:
    """Whoever took 2**53 - 1 as the last epoch or generation would make a decision that nobody can read."""
    with pytest.raises(Unreadable):
        Topology.from_json(topology("b", number).to_json())
    with pytest.raises(Unreadable):
        MapState.from_json(MapState(number, "id", "line", 1).to_json())
