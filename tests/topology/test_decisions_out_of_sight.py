"""Decisions that this host's settings, Redis or the disk do not have: none is lost unseen, each has a way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay.config import loader
from relay.ledger import keys
from relay.topology import decisions, followers, promotion
from relay.topology.state import Topology
from support.product import QUICK, SOON, Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = {**SOON, "relay.server.follower._TRY_AGAIN_SECONDS": 0.5}

Make = Callable[..., Product]
Servers = dict[str, ScriptedServer]
FILE = """
[[server]]
name = "a"
url = "{a}"
[[server]]
name = "b"
url = "{b}"
[[backup]]
name = "new"
url = "{new}"
[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "a"
backups = ["b"]
"""
PROMOTED = ("promote", "b", "--route", "shop", "--yes", "--force", "--reason", "test")


@pytest.fixture
def servers(scripted: Callable[..., ScriptedServer]) -> Servers:
    return {name: scripted() for name in ("old", "new", "a", "b")}


def text_of(servers: Servers) -> str:
    return FILE.format(**{name: server.address for name, server in servers.items()})


def host(product: Make, servers: Servers, redis_url: str, *, start: bool = True, **more: str) -> Product:
    """Return one of several relays with this Redis; it is not started where it only gives commands."""
    return product(
        primary=more.get("primary", f"old={servers['old'].address}"),
        command="relay",
        redis_url=redis_url,
        files={"settings.toml": more.get("text", text_of(servers))},
        settings=QUICK,
        start=start,
    )


@pytest.mark.parametrize("words", [("undo",), ("route", "reset", "shop")], ids=" ".join)
def test_a_route_that_was_renamed_after_a_decision(
    product: Make, servers: Servers, redis_url: str, words: tuple[str, ...]
) -> None:
    """What was decided for a route that is no more in the settings can be taken back, as the texts say."""
    relay = host(product, servers, redis_url)
    assert relay.run(*PROMOTED).returncode == 0
    (relay.directory / "settings.toml").write_text(text_of(servers).replace('name = "shop"', 'name = "store"'))
    assert relay.run("reload").returncode == 0
    told = relay.run("topology").stdout
    assert "`smtp-dup route reset shop` forgets that" in told
    dry = relay.run(*words, "--dry-run")
    assert (dry.returncode, "forgotten" in dry.stdout) == (0, True), dry.stdout + dry.stderr
    done = relay.run(*words, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What was decided for shop is forgotten since" in done.stdout
    assert "on 1 of 1 process" in done.stdout
    status = relay.json("topology")[0]
    assert (status["epoch"], status["primary"], status["routes"], status["settings_agree"]) == (2, "old", {}, True)
    assert (relay.json("audit")[0]["before"], relay.json("audit")[0]["after"]) == ("b", "as the settings say")
    assert relay.run("route", "reset", "shop", "--yes").returncode == 2, "nobody has decided about it any more"


def test_a_route_is_as_each_host_says_after_a_reset(product: Make, servers: Servers, redis_url: str) -> None:
    """A host without that route does not prevent that a decision about it is taken back; nor does it get one."""
    one = host(product, servers, redis_url)
    without = text_of(servers).partition("[[route]]")[0]
    two = host(product, servers, redis_url, text=without)
    refused = one.run(*PROMOTED)
    assert (refused.returncode, "its settings have no route shop" in refused.stdout) == (1, True)
    assert one.run(*PROMOTED, "--now").returncode == 0
    done = two.run("route", "reset", "shop", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert one.json("route", "x@shop.example")[0]["primary"] == "a"


def test_a_decision_about_a_route_changes_no_primary_by_default(
    product: Make, servers: Servers, redis_url: str
) -> None:
    """Hosts that begin with different primaries are told of before; with --now it is known what becomes of them."""
    one = host(product, servers, redis_url)
    turned = text_of(servers).replace("new", "old").replace(servers["new"].address, servers["old"].address)
    two = host(product, servers, redis_url, text=turned, primary=f"new={servers['new'].address}")
    refused = one.run(*PROMOTED)
    assert refused.returncode == 1
    assert "new is the primary by default there, old here" in refused.stdout
    assert "as the primary by default: that is old from then on" in refused.stdout
    assert two.json("route", "x@example.com")[0]["primary"] == "new"
    assert one.json("topology")[0]["epoch"] == 0
    assert one.run("promote", "old", "--yes", "--force", "--reason", "to agree").returncode == 0
    assert one.run(*PROMOTED).returncode == 0


def test_what_only_another_host_knows_is_not_overwritten(
    product: Make, servers: Servers, redis_url: str, redis_client: redis.Redis
) -> None:
    """Redis was emptied: a host that does not know the last decision makes no next one that would forget a part."""
    relay, elsewhere = host(product, servers, redis_url), host(product, servers, redis_url, start=False)
    assert relay.run(*PROMOTED).returncode == 0
    redis_client.delete(keys.TOPOLOGY)
    wait_until(lambda: "`smtp-dup promote old` puts it back" in relay.get("/readyz")[1])
    for words in (
        ("promote", "new", "--force", "--reason", "test"),
        ("route", "weight", "shop", "a=1", "b=1"),
        ("undo",),
    ):
        refused = elsewhere.run(*words, "--yes")
        assert refused.returncode in {1, 2}
        assert "goes by epoch 1, about shop, of which neither Redis nor this host knows" in refused.stderr
    assert redis_client.get(keys.TOPOLOGY) is None
    (status, *_) = [row for row in relay_rows(relay) if row["kind"] == "topology"]
    assert (status["epoch"], status["routes"]["shop"]["servers"]) == (1, ["b"]), "as the relays go by it"
    assert "Redis has none, and epoch 1 was decided" in str(status["trouble"])
    assert relay.json("route", "x@shop.example")[0]["primary"] == "b"
    again = relay.run("promote", "old", "--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert (decision(redis_client).epoch, list(decision(redis_client).now.routes)) == (2, ["shop"])
    assert relay.run("topology").returncode == 0


def relay_rows(relay: Product) -> list[dict[str, object]]:
    """Return what `topology` says, whatever it comes to."""
    return [json.loads(line) for line in relay.run("topology", "--json").stdout.splitlines()]


def decision(client: redis.Redis) -> Topology:
    found, _ = decisions.topology(client)
    assert found is not None
    return found


def test_a_decision_that_is_overtaken_is_not_said_to_hold(
    product: Make, servers: Servers, redis_url: str, redis_client: redis.Redis
) -> None:
    """Who waits for the first one hears of the second at once, and that it is the one that holds."""
    relay = host(product, servers, redis_url)
    settings = loader.load(environ=relay.environment, directories=(relay.directory,))
    plans = []
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}):
        plans.append(promotion.plan_weights(redis_client, settings, "shop", weights))
        promotion.commit(redis_client, plans[-1], "", {}, None)
    found = followers.follow(redis_client, plans[0], 60, lambda _: None)
    assert found.overtaken is not None
    assert (found.overtaken.epoch, found.is_well) == (2, False)
    last = followers.follow(redis_client, plans[1], 30, lambda _: None)
    assert (last.overtaken, last.is_well, len(last.followed)) == (None, True, 1)


def test_what_the_disk_does_not_take_is_kept_once_it_does(product: Make, servers: Servers, redis_url: str) -> None:
    """The decision is followed, the trouble is told, and it goes when the file is there: for a start without Redis."""
    relay = host(product, servers, redis_url)
    lock: Path = relay.state_dir / "topology.lock"
    lock.unlink(missing_ok=True)
    lock.mkdir()
    assert relay.run(*PROMOTED).returncode == 0
    wait_until(lambda: "its state folder cannot be written" in relay.get("/readyz")[1])
    lock.rmdir()
    wait_until(lambda: "its state folder cannot be written" not in relay.get("/readyz")[1])
    kept = Topology.from_json((relay.state_dir / "topology.json").read_bytes())
    assert (kept.epoch, list(kept.now.routes)) == (1, ["shop"])
