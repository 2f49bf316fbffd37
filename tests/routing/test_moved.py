"""Who answers for an address that has moved, and who gets copies then: before any route, by the most specific entry."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cockpit import moves
from relay.cockpit.moves import Kept, Wish
from relay.config.routes import Entries, Match, Route
from relay.mail.address_keys import entry_key
from relay.routing.decisions import RouteDecision, Router, owed
from relay.routing.moved_copy import MovedMap
from relay.topology.moved import MapState, MovedEntry

SERVERS = ("old", "new", "third", "a", "b")
BACKUPS = ("new", "third")
ROUTES = (
    Route("shop", Match(Entries(("@shop.example",))), ("a", "b"), backups=("new",)),
    Route("pair", Match(Entries(("@pair.example",))), ("a", "b"), backups=("new",), copies="others"),
    Route("shared", Match(Entries(("@shared.example",))), ("a", "b"), (3.0, 1.0), copies="others"),
)


def moved(**entries: str) -> MovedMap:
    """Return the map with these entries, a server for each."""
    made = {entry_key(key, fold=True): MovedEntry(server) for key, server in entries.items()}
    return MovedMap(MapState(1, "x", "l", 1, len(made)), dict.fromkeys(entries.values(), 1), made)


def decide(found: MovedMap, address: str, *routes: Route) -> tuple[RouteDecision, dict[str, list[int]]]:
    plan = Router(routes, {}, SERVERS, fold=True, moved=found).plan("old", "s@example.org", "127.0.0.1")
    decision = plan.decide(address)
    return decision, owed([decision], [decision.servers[0]], BACKUPS)


FORMS = (
    ("anna@a.example", "Anna+Tag@A.EXAMPLE.", "new"), ("anna@a.example", "annab@a.example", "old"),
    ("anna+tag@a.example", "anna@a.example", "old"), ("anna+tag@a.example", "anna+TAG@a.example", "new"),
    ("@a.example", "any@a.example", "new"), ("@a.example", "any@sub.a.example", "old"),
    ("@.a.example", "any@x.sub.a.example", "new"), ("@.a.example", "any@a.example", "old"),
    ('"quoted x"@a.example', '"Quoted\\ x"@a.example', "new"), ("anna@a.example", '"anna"@a.example', "new"),
    ("d\u00f6ra@b\u00fccher.example", "D\u00d6RA+x@xn--bcher-kva.example", "new"),
    ("@b\u00fccher.example", "x@xn--bcher-kva.example", "new"),
    ("@[192.0.2.1]", "x@[192.0.2.1]", "new"), ("postmaster@a.example", "postmaster", "old"),
    ("postmaster@a.example", "postmaster@a.example", "new"), ("@a.example", "@relay.example:x@a.example", "new"),
    ("anna@a.example", "", "old"), ("anna@a.example", "anna", "old"),
)  # fmt: skip


@pytest.mark.parametrize(("entry", "address", "server"), FORMS)
def test_forms_of_addresses(entry: str, address: str, server: str) -> None:
    """As in a table of routes; an address without a domain never moves."""
    decision, copies = decide(moved(**{entry: "new"}), address)
    assert decision.servers == (server,)
    assert sorted(copies) == sorted({"old", "new", "third"} - {server}), "all others have it"


def test_the_most_specific_entry_counts_and_an_address_can_stay() -> None:
    """With the tag, without, the domain, its parent; an entry for the server of before keeps one whose domain moves."""
    found = moved(**{"boss@a.example": "old", "boss+new@a.example": "new", "@a.example": "third", "@.example": "new"})
    asked = ("boss@a.example", "boss+x@a.example", "boss+new@a.example", "x@a.example", "x@b.example", "x@c.test")
    assert [decide(found, address)[0].servers[0] for address in asked] == ["old", "old", "new", "third", "new", "old"]


def test_who_moved_off_a_route_leaves_copies_where_it_was() -> None:
    """The server that the route would have chosen gets a copy, and so do all that the route owes one."""
    every = moved(**{f"u{n}@{d}.example": "new" for n in range(40) for d in ("shop", "pair", "shared")})
    for n in range(40):
        decision, copies = decide(every, f"u{n}@shop.example", *ROUTES)
        assert (decision.servers, sorted(copies)) == (("new",), ["a"])
        assert sorted(decide(every, f"u{n}@pair.example", *ROUTES)[1]) == ["a", "b"]
        assert sorted(decide(every, f"u{n}@shared.example", *ROUTES)[1]) == ["a", "b"]


def test_an_entry_for_a_server_that_is_not_here_is_none() -> None:
    """Settings of another host may name it: here the former server answers, and nothing fails."""
    found = moved(**{"anna@a.example": "elsewhere", "@b.example": "new"})
    assert decide(found, "anna@a.example")[0].servers == ("old",)
    assert Router((), {}, SERVERS, fold=True, moved=moved(**{"x@a": "elsewhere"})).moved_to == ()


def test_mail_goes_through_at_once_where_all_have_moved_to_whoever_answers() -> None:
    """After the promotion of the server that all have moved to the entries are superfluous, and MAIL waits for none."""
    router = Router((), {}, SERVERS, fold=True, moved=moved(**{"@a.example": "new"}))
    assert router.plan("old", "", "127.0.0.1").settled is None
    settled = router.plan("new", "", "127.0.0.1").settled
    assert settled is not None
    assert settled.servers == ("new",)


@given(
    st.dictionaries(
        st.sampled_from(
            ["u1@shop.example", "u1@x.test", "u2+t@x.test", "@x.test", "@.test", "@pair.example", "@shared.example"]
        ),
        st.sampled_from(SERVERS),
    ),
    st.sampled_from(SERVERS[:3]),
)
def test_one_answers_and_nobody_is_forgotten(entries: dict[str, str], primary: str) -> None:
    """Whatever has moved, a recipient has one primary, and whoever had its mail without the move has it still."""
    backups = [name for name in ("old", "new", "third") if name != primary]
    plain = Router(ROUTES, {}, SERVERS, fold=True).plan(primary, "", "127.0.0.1")
    found = Router(ROUTES, {}, SERVERS, fold=True, moved=moved(**entries)).plan(primary, "", "127.0.0.1")
    for local, domain in itertools.product(
        ("u1", "u2+t", "u3"), ("shop.example", "x.test", "y.test", "pair.example", "shared.example")
    ):
        before, after = plain.decide(f"{local}@{domain}"), found.decide(f"{local}@{domain}")
        had = {before.servers[0], *owed([before], [before.servers[0]], backups)}
        has = owed([after], [after.servers[0]], backups)
        assert after.servers[0] not in has
        assert had <= {after.servers[0], *has}


ASKED = (
    ("anna@a.example", "anna@a.example"), ("<Anna@A.example>", "anna@a.example"), ("@a.example", "@a.example"),
    (" anna@a.example ", "anna@a.example"), ('"x y"@a.example', "x y@a.example"), ("anna", None), ("*", None),
    ("<>", None), ("", None), ("@", None), ("a@", None), ("a b@c.example", None), ("a@-c.example", None),
    ("a\x1b[31m@c.example", None), ("a@c..example", None), ("a@" + "c" * 300, None), ("a" * 2000 + "@c.example", None),
    ("\udcff@c.example", None),
)  # fmt: skip


@pytest.mark.parametrize(("text", "key"), ASKED, ids=lambda value: repr(value)[:30])
def test_what_an_operator_types(text: str, key: str | None) -> None:
    """An address or @domain; anything else is one clear line, whatever it holds."""
    found = moves.wish(text, fold=True)
    if key is None:
        assert isinstance(found, Kept)
        assert f"{found.address}{found.why}".isprintable()
        assert len(found.why) < 200
    else:
        assert isinstance(found, Wish)
        assert found.key == key
