"""The weights of a route by the page: asked for, agreed to, refused beside the field, and undone, as by the command."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from relay.ledger import audit, flow
from relay.ledger.audit import Act
from relay.topology import decisions, moving, promotion
from relay.topology.heartbeats import Pulse
from relay.topology.moved import MovedEntry
from relay.topology.state import RouteRoles
from support.served_page import PageClient, Reply, ServedPage, served_page, users_file
from support.waiting import wait_until

SETTINGS = """
[[server]]
name = "a"
url = "a.example.com:25"

[[server]]
name = "b"
url = "b.example.com:25"

[[route]]
name = "shop"
match = { recipients = "@shop.example" }
primary = "a"
backups = ["b"]
"""
NINE_TO_ONE = {"weight.a": "9", "weight.b": "1"}


@pytest.fixture
def shop(redis_url: str, tmp_path: Path) -> Iterator[ServedPage]:
    """A page with the users ann (operator) and victor (viewer), and a route."""
    users = users_file(tmp_path, "ann:operator", "victor:viewer")
    (tmp_path / "routes.toml").write_text(SETTINGS)
    with served_page(redis_url, tmp_path, status__users_file=str(users), config=str(tmp_path / "routes.toml")) as page:
        yield page


def roles(page: ServedPage) -> RouteRoles | None:
    """Return what was decided for the route."""
    found = decisions.view(page.redis).topology
    return found.now.routes.get("shop") if found else None


def agree(client: PageClient, path: str = "/routes/shop", **form: str) -> Reply:
    """Send the form of a change, with the token of the session."""
    return client.post(path, {"csrf": client.get("/routes").csrf, **form})


def carried_out(client: PageClient, begun: Reply) -> str:
    """Wait for the end of what was begun; returns what the page says then."""
    assert begun.status == 303, begun.text
    said: list[str] = []

    def is_over() -> bool:
        said.append(client.get(begun.headers["location"]).text)
        return "data-live" not in said[-1]

    wait_until(is_over)
    return said[-1]


def test_weights_are_asked_for_agreed_to_and_undone(shop: ServedPage) -> None:
    """A look changes nothing; what is then decided, and its audit, are those of the command; undo takes it back."""
    ann = shop.logged_in("ann")
    assert 'href="/routes/shop"' in ann.get("/routes").text
    asked = ann.get("/routes/shop")
    fields = re.findall(r'<label for="([\w-]+)">([^<]+)</label><input id="\1" name="(weight\.\w)"', asked.text)
    assert fields == [("weight-1", "a", "weight.a"), ("weight-2", "b (backup)", "weight.b")]
    assert "type the name" not in asked.text, "nothing has been asked for yet"
    shown = ann.get("/routes/shop?weight.a=9&weight.b=1")
    assert shown.status == 200
    for text in ("a 90 %, b 10 %, instead of a", "type the name of the route: shop", "connection to a and b"):
        assert text in shown.text, text
    assert (roles(shop), list(audit.acts(shop.redis))) == (None, [])

    planned = promotion.plan_weights(shop.redis, shop.settings, "shop", {"a": 9.0, "b": 1.0})
    said = carried_out(ann, agree(ann, typed="shop", reason="ten percent", **NINE_TO_ONE))
    assert "Decided at" in said
    assert roles(shop) == planned.routes["shop"] == RouteRoles(("a", "b"), (9.0, 1.0), (), "others")
    (act,) = audit.acts(shop.redis)
    assert (act.command, act.who, act.before, act.after, act.reason, act.details["route"]) == (
        "route weight", "ann (page)", "a", "a=9 b=1", "ten percent", "shop",
    )  # fmt: skip
    now = ann.get("/routes/shop").text
    assert re.findall(r'name="weight\.(\w)"[^>]* value="(\d*)"', now) == [("a", "9"), ("b", "1")]
    again = agree(ann, typed="shop", **NINE_TO_ONE)
    assert again.status == 400
    assert "that is so already" in again.text

    carried_out(ann, agree(ann, "/cutover/undo", typed="a"))
    assert roles(shop) is None
    assert [act.command for act in audit.acts(shop.redis)] == ["undo", "route weight"]


@pytest.mark.parametrize(
    ("given", "place", "text"),
    [
        ({"weight.a": "nine", "weight.b": "1"}, "weight-1-wrong", "a weight of 0 or more, not nine"),
        ({"weight.a": "9", "weight.b": "-1"}, "weight-2-wrong", "a weight of 0 or more, not -1"),
        ({"weight.a": "9", "weight.b": "nan"}, "weight-2-wrong", "a weight of 0 or more, not nan"),
        ({"weight.a": "9", "weight.b": "<i>\u202e"}, "weight-2-wrong", "not &lt;i&gt;\\u202e"),
        ({"weight.a": "", "weight.b": "1"}, "weights-wrong", "give a a weight too: 0 takes none"),
        ({"weight.a": "0", "weight.b": "0"}, "weights-wrong", "somebody has to answer"),
        ({"weight.a": "1", "weight.x": "1"}, "weights-wrong", "x: no server of the route shop"),
        ({"weight.a": "1", "weight.x": "?"}, "weights-wrong", "x: expected a weight of 0 or more"),
    ],
)
def test_weights_that_cannot_be_are_told_beside_the_field(
    shop: ServedPage, given: dict[str, str], place: str, text: str
) -> None:
    """Asked for or sent: nothing changes, and what was given stays in its field."""
    ann = shop.logged_in("ann")
    for reply in (ann.get(f"/routes/shop?{urlencode(given)}"), agree(ann, typed="shop", **given)):
        assert reply.status == 400, reply.text
        said = re.search(rf'id="{place}">([^<]*)<', reply.text)
        assert said, reply.text
        assert text in said[1]
        assert f'aria-describedby="{place}"' in reply.text
    assert (roles(shop), list(audit.acts(shop.redis))) == (None, [])


@pytest.mark.parametrize("given", [{}, {"typed": "chop"}, {"typed": "a"}, {"typed": "shop", "wait": "soon"}])
def test_weights_are_agreed_to_by_the_name_of_the_route(shop: ServedPage, given: dict[str, str]) -> None:
    ann = shop.logged_in("ann")
    reply = agree(ann, **given, **NINE_TO_ONE)
    assert reply.status == 400
    assert f'aria-describedby="{"wait" if "wait" in given else "typed"}-wrong"' in reply.text
    assert 'type="hidden" name="weight.b" value="1"' in reply.text, "it can be corrected and sent again"
    assert roles(shop) is None


def test_weights_are_an_operators(shop: ServedPage) -> None:
    """A viewer may look; without the session's token nothing is done; an unknown route is none."""
    ann, victor = shop.logged_in("ann"), shop.logged_in("victor")
    assert "A viewer changes nothing" in victor.get("/routes/shop?weight.a=9&weight.b=1").text
    assert agree(victor, typed="shop", **NINE_TO_ONE).status == 403
    assert ann.post("/routes/shop", {"typed": "shop", **NINE_TO_ONE}).status == 403
    assert ann.post("/routes/shop", {"csrf": victor.get("/routes").csrf, "typed": "shop", **NINE_TO_ONE}).status == 403
    assert [ann.get(f"/routes/{name}").status for name in ("chop", "default")] == [404, 404]
    assert agree(ann, "/routes/chop", typed="chop", **NINE_TO_ONE).status == 404
    assert roles(shop) is None


def test_the_name_that_is_typed_is_said_to_be_what_it_is(redis_url: str, tmp_path: Path) -> None:
    """Where a route has the name of a server, weights ask for the route, and a promotion for the server."""
    users = users_file(tmp_path, "ann:operator")
    (tmp_path / "routes.toml").write_text(SETTINGS.replace('name = "shop"', 'name = "a"'))
    with served_page(redis_url, tmp_path, status__users_file=str(users), config=str(tmp_path / "routes.toml")) as page:
        ann = page.logged_in("ann")
        assert "name of the route: a<" in ann.get(f"/routes/a?{urlencode(NINE_TO_ONE)}").text
        assert "name of the server that shall answer: b<" in ann.get("/routes/a/b").text


def test_who_has_moved_is_a_view_without_routes_too(page: ServedPage) -> None:
    """Whoever moves mailboxes by command has no route in the settings: the view is there all the same, with numbers."""
    ann = page.logged_in("ann")
    assert 'href="/routes"' not in ann.get("/").text
    moving.commit(page.redis, {"x@shop.example": MovedEntry("b", 1.0, "ann")}, {}, 0, Act("move"))
    hour = flow.HOUR.key(flow.HOUR.start(time.time()))
    page.redis.hset(hour, mapping={"accepted moved b": 1234, "refused moved b": 5})
    wait_until(lambda: 'href="/routes"' in ann.get("/").text)  # numbers beside the tabs are kept for two seconds
    moved = ann.get("/routes").text.partition("Who has moved")[2]
    assert re.findall(r"<t[dh][^>]*data-title=\"([^\"]*)\">(?:<span[^>]*>)*([^<]*)", moved) == [
        ("server", "b"), ("answers for", "1 address or domain"), ("state", "ok"),
        ("accepted in a day", "1,234"), ("refused", "5"), ("failovers", "0"),
    ]  # fmt: skip


def test_the_routes_say_where_hosts_differ(shop: ServedPage) -> None:
    """Other settings by the same name, and a process that goes by an older map of who has moved."""
    ann = shop.logged_in("ann")
    assert "Hosts differ" not in ann.get("/routes").text
    moving.commit(shop.redis, {"x@shop.example": MovedEntry("b", 1.0, "ann")}, {}, 0, Act("move"))
    for number, digest in enumerate(("one", "one", "<b>other</b>")):
        pulse = Pulse(f"host-{number} /var/lib/x", "relay-1", number)
        pulse.settings, pulse.primary, pulse.moved = {"server a": digest}, "old", min(number, 1)
        with shop.redis.pipeline(transaction=False) as pipe:
            pulse.ask(pipe)
            pipe.execute()
    wait_until(lambda: "Hosts differ" in ann.get("/routes").text)  # a look is kept for a second
    said = re.findall(r"<p>(Hosts differ[^<]*)", ann.get("/routes").text)
    assert len(said) == 2, said
    assert "have another server a, beside those of other hosts" in said[0]
    assert "has not followed: it goes by generation 0" in said[1]
    moved = ann.get("/routes").text.partition("Who has moved")[2]
    assert re.search(r"generation 1.*?>b</th>.*?1", moved, re.DOTALL)
