"""What a decision about a route makes of it: nobody who had its mail loses it, and what is stored is read with care."""

from __future__ import annotations

import json

import pytest

from relay.config.routes import Match, Route
from relay.topology import route_roles
from relay.topology.route_roles import Unsuitable
from relay.topology.state import Decision, RouteRoles, Topology, Unreadable

SHOP = Route("shop", Match(), ("a",), backups=("b", "c"))
ORDER = Route("order", Match(), ("a", "b"), backups=("c",))
REDUNDANT = Route("redundant", Match(), ("a", "b"), backups=("c",), copies="others")
SHARED = Route("shared", Match(), ("a", "b"), (3.0, 1.0), ("c",))


def reached(route: Route, answered: str) -> set[str]:
    """Return everybody who has the mail that one of its servers answers for."""
    return {answered, *route.copied}


@pytest.mark.parametrize("route", [SHOP, ORDER, REDUNDANT], ids=lambda route: route.name)
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_whoever_is_promoted_answers_and_nobody_loses_mail(route: Route, name: str) -> None:
    after = route_roles.applied(route, route_roles.promoted(route, name))
    assert after.answering[0] == name
    if name in route.servers:
        assert reached(after, name) >= reached(route, name)
        assert set(after.servers) == set(route.servers)
    else:
        assert reached(after, name) >= reached(route, route.servers[0])
    assert name not in after.backups


def test_one_of_those_who_share_mail_can_take_it_all_but_no_backup_can() -> None:
    assert route_roles.promoted(SHARED, "b") == RouteRoles(("b", "a"), (), ("c",), "backups")
    with pytest.raises(Unsuitable, match="none of which has all of it"):
        route_roles.promoted(SHARED, "c")
    with pytest.raises(Unsuitable, match="it has a, b, c"):
        route_roles.promoted(SHOP, "x")


def test_a_backup_gets_a_share_and_both_go_on_to_have_all_mail() -> None:
    """1 %, 10 %, 100 % and back: at each step whoever does not answer gets a copy."""
    route = SHOP
    for share in (1, 10, 100, 0):
        route = route_roles.applied(route, route_roles.weighed(route, {"a": 100 - share, "b": share}))
        for answered in route.answering:
            assert reached(route, answered) >= {"a", "b", "c"}
        assert route.answering == tuple(n for n, s in (("a", 100 - share), ("b", share)) if s)


@pytest.mark.parametrize(
    ("route", "weights", "text"),
    [
        (SHOP, {"a": 1, "x": 1}, "x: no server of the route shop"),
        (SHOP, {"b": 1}, "give a a weight too"),
        (SHOP, {"a": 0}, "somebody has to answer"),
        (SHARED, {"a": 1, "b": 1, "c": 1}, "only a server that all mail of shared goes to"),
        (ORDER, {"a": 1, "b": 1, "c": 1}, "only a server that all mail of order goes to"),
    ],
)
def test_weights_that_cannot_be(route: Route, weights: dict[str, float], text: str) -> None:
    with pytest.raises(Unsuitable, match=text):
        route_roles.weighed(route, weights)


# The stored form --------------------------------------------------------------------------------------------------


def test_the_stored_form_is_that_of_an_older_version_where_no_route_was_decided() -> None:
    plain = Topology(Decision(2, "new", ("old",), "alice", 5.0, "x"), Decision(0, "old"))
    assert "routes" not in json.dumps(json.loads(plain.to_json()))
    assert Topology.from_json(plain.to_json()) == plain
    former = (
        '{"epoch": 1, "primary": "new", "backups": ["old"], "by": "a", "at": 1.5, "reason": "", "previous": '
        '{"epoch": 0, "primary": "old", "backups": [], "by": "", "at": 0.0, "reason": ""}}'
    )
    assert Topology.from_json(former).now.routes == {}


def test_the_roles_of_routes_are_stored() -> None:
    shared = {"shop": route_roles.weighed(SHOP, {"a": 9, "b": 1}), "x": RouteRoles(("b",), backups=("a",))}
    made = Topology(Decision(3, "old", routes=shared), Decision(2, "old", routes={"x": shared["x"]}))
    assert Topology.from_json(made.to_json()) == made
    assert made.in_words() == "set shop: a=9 b=1"


@pytest.mark.parametrize(
    "roles",
    [
        "shop",
        {"servers": []},
        {"servers": "ab"},
        {"servers": ["a", "a"]},
        {"servers": ["a", 1]},
        {"servers": ["a\nb"]},
        {"servers": ["a"], "weights": [1, 2]},
        {"servers": ["a"], "weights": [0]},
        {"servers": ["a", "b"], "weights": [1, -1]},
        {"servers": ["a", "b"], "weights": [1, 1e400]},
        {"servers": ["a", "b"], "weights": [1, "2"]},
        {"servers": ["a"], "backups": {"b": 1}},
        {"servers": ["a"], "copies": "all"},
        {"servers": ["a"], "copies": ["others"]},
    ],
)
def test_roles_that_make_no_sense_are_none(roles: object) -> None:
    record = {"epoch": 1, "primary": "a", "backups": [], "routes": {"shop": roles}}
    with pytest.raises(Unreadable):
        Topology.from_json(json.dumps({**record, "previous": {"epoch": 0, "primary": "a", "backups": []}}))


@pytest.mark.parametrize("name", ["", "a b", "-x", "x" * 65, "a\n"])
def test_a_route_with_a_name_that_is_none(name: str) -> None:
    record = {"epoch": 1, "primary": "a", "backups": [], "routes": {name: {"servers": ["a"]}}}
    with pytest.raises(Unreadable):
        Topology.from_json(json.dumps({**record, "previous": {"epoch": 0, "primary": "a", "backups": []}}))
