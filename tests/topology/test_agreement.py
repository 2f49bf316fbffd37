"""Hosts whose settings mean something else by a name are told apart, by all that look; and nothing is prevented."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import redis

from relay.config import loader
from relay.config.model import Settings
from relay.ledger import keys
from relay.topology import agreement, decisions
from relay.topology.heartbeats import Pulse
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer

SERVERS = """
[[server]]
name = "a"
url = "{a}"
[[server]]
name = "b"
url = "{b}"
"""
SHOP = """
[[route]]
name = "shop"
match = { recipients = "@shop.example" }
primary = { a = 3, b = 1 }
"""
FORUM = """
[[route]]
name = "forum"
match = { recipients = "@forum.example" }
primary = "a"
"""
BASE = SERVERS.format(a="a.example:25", b="b.example:25")


def told(client: redis.Redis, hosts: dict[str, str], read: Callable[[str], Settings]) -> list[str]:
    """Return what is told of hosts with these settings files."""
    client.delete(keys.RELAYS)
    for host, text in hosts.items():
        settings = read(text)
        for n in (1, 2):
            pulse = Pulse(f"{host} /var/lib/x", f"relay-{n}", n)
            pulse.settings, pulse.primary = agreement.fingerprints(settings), "old"
            with client.pipeline(transaction=False) as pipe:
                pulse.ask(pipe)
                pipe.execute()
            found = json.loads(client.hget(keys.RELAYS, pulse.process) or b"")
            client.hset(keys.RELAYS, pulse.process, json.dumps({**found, "host": host}))
    return list(agreement.differences(decisions.view(client)))


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (BASE + SHOP + FORUM, ""),
        (BASE + FORUM, "no route shop"),
        (BASE + SHOP.replace("3", "2") + FORUM, "another route shop"),
        (BASE + FORUM + SHOP, "another order of routes"),
        (BASE + SHOP.replace("@shop", "@stop") + FORUM, "another route shop"),
        (BASE.replace("b.example", "c.example") + SHOP + FORUM, "another server b"),
        (
            BASE + '[[server]]\nname = "c"\nurl = "c.example:25"\n' + SHOP + FORUM.replace("forum", "board"),
            "a further route board, no route forum, a further server c",
        ),
    ],
)
def test_who_is_otherwise_is_named(
    redis_client: redis.Redis, tmp_path_factory: pytest.TempPathFactory, other: str, text: str
) -> None:
    """One of three hosts, once, though it has two processes; hosts that agree are not told of."""

    def read(file: str) -> Settings:
        folder = tmp_path_factory.mktemp("host")
        (folder / "settings.toml").write_text(file)
        return loader.load(environ={"SMTP_DUP_RELAY_DESTINATION_PRIMARY": "old=old.example:25"}, directories=(folder,))

    found = told(redis_client, {"h1": BASE + SHOP + FORUM, "h2": other, "h3": BASE + SHOP + FORUM}, read)
    assert found == ([f"the settings of h2/1 have {text}, beside those of other hosts"] if text else [])


def test_all_that_look_say_so(
    product: Callable[..., Product], scripted: Callable[..., ScriptedServer], redis_url: str
) -> None:
    """topology, /readyz, ready's criterion about relays; a decision goes through all the same."""
    servers = {name: scripted() for name in ("old", "a", "b")}
    text = SERVERS.format(**{name: server.address for name, server in servers.items()}) + SHOP + FORUM
    one, two = (
        product(
            primary=f"old={servers['old'].address}",
            command="relay",
            redis_url=redis_url,
            files={"settings.toml": file},
            settings=QUICK,
        )
        for file in (text, text.replace("a = 3", "a = 2"))
    )
    said = "another route shop, beside those of other hosts"
    assert said in one.run("topology").stdout
    assert said in one.json("topology")[0]["differences"][0]
    assert any(said in warning for warning in json.loads(two.get("/readyz")[1])["warnings"])
    assert one.run("route", "weight", "shop", "a=1", "b=1", "--yes").returncode == 0
