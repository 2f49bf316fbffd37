"""A decision about one route while mail goes on: all processes follow, nobody else is moved, and it can be undone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest
import redis

from relay.config import loader
from relay.ledger import keys
from relay.topology import followers, heartbeats, promotion
from relay.topology.promotion import Unprepared
from support.dns_server import DnsServer
from support.product import SOON, Product
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]
Servers = dict[str, ScriptedServer]
FORCED = ("--yes", "--force", "--reason", "test")
SETTINGS = {"retry.first": "1", "relay.timeout_seconds": "2", "relay.uncertain_hold": "1"}
SHOP = """
[[route]]
name = "shop"
match = { recipients = "@shop.example" }
primary = "a"
backups = ["b"]
"""


@pytest.fixture
def servers(scripted: Callable[..., ScriptedServer]) -> Servers:
    return {name: scripted() for name in ("old", "a", "b")}


def relay_of(product: Make, servers: Servers, routes: str = SHOP, **settings: str) -> Product:
    """Return the product with "old" as the primary by default, servers a and b, and these routes."""
    return product(primary=f"old={servers['old'].address}", files={"settings.toml": file_of(servers, routes)},
                   settings={**SETTINGS, **{k.replace("__", "."): v for k, v in settings.items()}})  # fmt: skip


def file_of(servers: Servers, routes: str) -> str:
    tables = (f'[[server]]\nname = "{n}"\nurl = "{s.address}"\n' for n, s in servers.items() if n != "old")
    return "".join(tables) + routes


def send(relay: Product, subject: str, to: str = "x@shop.example") -> None:
    relay.send("s@example.org", to, data=f"Subject: {subject}\r\n\r\n{subject}\r\n".encode())


def subjects(server: ScriptedServer) -> list[str]:
    return [m.header("Subject") or "" for m in server.messages]


def readiness(relay: Product, *words: str) -> list[dict[str, object]]:
    """Return the verdicts, whatever they come to."""
    return [json.loads(line) for line in relay.run("ready", *words, "--json").stdout.splitlines()]


def test_a_promotion_on_a_route_and_its_undo(product: Make, servers: Servers) -> None:
    """Its new server answers, the former one gets copies with the null sender; other mail goes as before; and back."""
    relay = relay_of(product, servers, smtp__processes="2")
    send(relay, "one")
    servers["b"].wait_for(1)
    assert relay.run("promote", "b", "--route", "shop", "--dry-run").returncode == 1, "readiness is not known"
    assert [(v["destination"], v["primary"]) for v in readiness(relay, "--route", "shop")] == [("b", "a")]
    assert (
        relay.run("ready", "--route", "chop").returncode == relay.run("ready", "a", "--route", "shop").returncode == 2
    )
    for wrong in (("b", "--route", "chop"), ("old", "--route", "shop"), ("x", "--route", "shop")):
        assert relay.run("promote", *wrong, *FORCED).returncode == 2
    done = relay.run("promote", "b", "--route", "shop", *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "b, instead of a" in done.stdout
    assert "2 of 2 processes" in done.stdout
    send(relay, "two")
    send(relay, "elsewhere", "x@example.com")
    servers["a"].wait_for(2)
    assert sorted(subjects(servers["b"])) == ["one", "two"]
    assert {m.header("Subject"): m.sender for m in servers["a"].messages} == {"one": "s@example.org", "two": ""}
    assert subjects(servers["old"]) == ["elsewhere"]
    (row,) = relay.json("route", "x@shop.example")
    assert (row["primary"], row["backups"]) == ("b", ["a"])
    assert [(v["destination"], v["primary"]) for v in readiness(relay, "--route", "shop")] == [("a", "b")]
    status = relay.json("topology")
    assert (status[0]["epoch"], status[0]["primary"], status[0]["settings_agree"]) == (1, "old", False)
    assert status[0]["routes"]["shop"]["servers"] == ["b"]
    assert all(process["follows"] for process in status if process["kind"] == "process")
    assert "the route shop was decided to be b, although the settings say a" in relay.run("check").stdout
    assert "route shop" in relay.run("topology").stdout
    assert json.loads(relay.get("/readyz")[1])["ready"]
    assert relay.run("promote", "b", "--route", "shop", "--yes").returncode == 0, "nothing to do"

    back = relay.run("undo", "--yes")
    assert back.returncode == 0, back.stdout + back.stderr
    send(relay, "three")
    assert "three" in subjects(servers["a"])
    servers["b"].wait_for(3)
    acts = relay.json("audit")
    assert [(a["command"], a["before"], a["after"], a["details"]["route"]) for a in acts] == [
        ("undo", "b", "a", "shop"), ("promote", "a", "b", "shop"),
    ]  # fmt: skip
    assert relay.run("undo", "--yes").returncode == 0, "a second undo undoes the first"
    assert relay.json("route", "x@shop.example")[0]["primary"] == "b"
    assert "shop: b 0" in relay.run("top", "--once").stdout
    listed = {row["route"]: row for row in relay.json("route", "list")}
    assert [s["name"] for s in listed["shop"]["servers"] if s["answers"]] == ["b"]
    assert (listed["shop"]["decided"], list(listed)) == (True, ["shop", "default"])
    assert "shop: recipients=@shop.example; b, as it was decided" in relay.run("route", "list").stdout
    again = relay.run("route", "reset", "shop", "--yes")
    assert again.returncode == 0, again.stdout + again.stderr
    assert relay.json("topology")[0]["settings_agree"] is True
    assert relay.json("route", "x@shop.example")[0]["primary"] == "a"
    assert relay.stop() == 0


def test_each_decision_leaves_the_others(product: Make, servers: Servers) -> None:
    """By default and on a route: undo takes back what was last, and only that."""
    routes = SHOP.replace('backups = ["b"]', 'backups = ["b", "old"]')
    relay = product(primary=f"old={servers['old'].address}", backups=[f"new={servers['a'].address}"],
                    files={"settings.toml": file_of(servers, routes).replace(
                        f'[[server]]\nname = "a"\nurl = "{servers["a"].address}"\n', "").replace('"a"', '"new"')},
                    settings=SETTINGS)  # fmt: skip
    assert relay.run("promote", "b", "--route", "shop", *FORCED).returncode == 0
    done = relay.run("promote", "new", *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert relay.json("route", "x@shop.example")[0]["primary"] == "b"
    assert relay.json("route", "x@example.com")[0]["primary"] == "new"
    assert relay.run("undo", "--yes").returncode == 0
    assert relay.json("route", "x@shop.example")[0]["primary"] == "b"
    assert relay.json("route", "x@example.com")[0]["primary"] == "old"
    weighed = {row["kind"]: row for row in relay.json("route", "weight", "shop", "b=1", "new=2", "--yes")}
    assert {weighed[kind]["primary"] for kind in ("plan", "promoted", "followed")} == {"new"}, (
        "who answers for most of it"
    )
    assert (weighed["plan"]["former"], weighed["plan"]["backups"]) == ("b", ["old", "b"]), "of the route"
    undone = {row["kind"]: row for row in relay.json("undo", "--yes")}
    assert {undone[kind]["primary"] for kind in ("plan", "promoted", "followed")} == {"b"}
    (row,) = relay.json("route", "x@shop.example")
    assert (row["primary"], row["weights"]) == ("b", {})


def test_weights_by_command(product: Make, servers: Servers) -> None:
    """1 %, 10 %, 100 % and back under mail: only so many mailboxes move, back to where they were, and all have all."""
    relay = relay_of(product, servers, smtp__processes="2")
    mailboxes = [f"u{n}@shop.example" for n in range(40)]

    def answering() -> dict[str, str]:
        return {who: relay.json("route", who)[0]["primary"] for who in mailboxes[:10]}

    assert relay.run("route", "weight", "shop", "a=1", "x=9", "--yes").returncode == 2
    assert relay.run("route", "weight", "shop", "a=1", "b=-9", "--yes").returncode == 2
    assert relay.run("route", "weight", "shop", "a=one", "--yes").returncode == 2
    assert relay.run("route", "weight", "shop", "a=9", "b=1").returncode == 2, "nobody to ask"
    dry = relay.run("route", "weight", "shop", "a=9", "b=1", "--dry-run")
    assert dry.returncode == 0
    assert "a 90 %, b 10 %" in dry.stdout
    shares = (1, 5, 10, 0)
    for share in shares:
        done = relay.run("route", "weight", "shop", f"a={10 - share}", f"b={share}", "--yes")
        assert done.returncode == 0, done.stdout + done.stderr
        for who in mailboxes:
            send(relay, f"{share}", who)
    assert answering() == dict.fromkeys(mailboxes[:10], "a")
    for name in ("a", "b"):
        servers[name].wait_for(len(mailboxes) * len(shares))
    both = [Counter(t.recipients[0] for t in servers[name].messages) for name in ("a", "b")]
    assert both[0] == both[1] == Counter(dict.fromkeys(mailboxes, len(shares)))
    at_b = {
        share: {t.recipients[0] for t in servers["a"].messages if not t.sender and t.header("Subject") == str(share)}
        for share in shares
    }
    assert set() == at_b[0] < at_b[1] < at_b[5] < at_b[10] == set(mailboxes), "only so many move, and those come back"
    assert relay.json("audit")[0]["details"]["route"] == "shop"
    assert relay.run("undo", "--yes").returncode == 0
    assert answering() == dict.fromkeys(mailboxes[:10], "b")


def test_weights_change_under_load(product: Make, servers: Servers) -> None:
    """Each message is answered by exactly one server, and both have it, however often it is changed meanwhile."""
    relay = relay_of(product, servers, smtp__processes="2")
    settings = loader.load(environ=relay.environment, directories=[relay.directory])
    sender = Sender(relay.smtp_port, range(300), recipients=("r{}@shop.example",))
    sender.pause_at(0)
    sender.start()
    with redis.Redis.from_url(relay.redis_url) as client:
        for step, share in enumerate((1, 5, 10, 0, 10, 5), 1):
            sender.pause_at(50 * step)
            plan = promotion.plan_weights(client, settings, "shop", {"a": 10 - share, "b": share})
            promotion.commit(client, plan, "test", {}, promotion.prepare(client, plan, 30, lambda _: None))
            assert followers.follow(client, plan, 30, lambda _: None).is_whole
    assert sender.join() == set(range(300))
    for name in ("a", "b"):
        servers[name].wait_for(300)
    everything = {
        n: Counter((t.header("Subject") or "").removeprefix("message ") for t in servers[n].messages)
        for n in ("a", "b")
    }
    assert everything["a"] == everything["b"] == Counter(map(str, range(300)))


def test_a_process_of_an_older_version_prevents_a_decision_about_a_route(product: Make, servers: Servers) -> None:
    """It could not follow; of what it reads it understands all but the routes, and it is named."""
    relay = relay_of(product, servers)
    settings = loader.load(environ=relay.environment, directories=[relay.directory])
    with redis.Redis.from_url(relay.redis_url) as client:
        beat = heartbeats.Pulse("older /var/lib/older", "relay-1", 1)
        older = json.loads(client.hvals(keys.RELAYS)[0]) | {"host": "older", "name": "relay-1", "version": "0.0.9"}
        del older["routes"]
        plan = promotion.plan_on_route(client, settings, "b", "shop")

        def say_so(_: str) -> None:
            intent = json.loads(client.get(keys.INTENT) or b'{"id": ""}')["id"]
            at = sum(part / 10 ** (6 * n) for n, part in enumerate(client.time()))
            client.hset(keys.RELAYS, beat.process, json.dumps(older | {"prepared": intent, "at": at}))

        say_so("")
        with pytest.raises(Unprepared) as refused:
            promotion.prepare(client, plan, 30, say_so)
        assert refused.value.lines == ["older/1: smtp-dup 0.0.9 there knows no decision about routes"]
        promotion.commit(client, plan, "", {}, None)

        def late() -> list[str]:
            say_so("")
            return [beat.label for beat in followers.follow(client, plan, 0, lambda _: None).late]

        wait_until(lambda: late() == ["older/1"])
        (status, *_) = map(json.loads, relay.run("topology", "--json").stdout.splitlines())
        assert status["routes"]["shop"]["servers"] == ["b"]


@pytest.mark.parametrize("split", ["defer", "fork"])
def test_weights_that_change_within_a_transaction(product: Make, servers: Servers, split: str) -> None:
    """A transaction ends as it began: between two recipients nobody else begins to answer, and copies follow that."""
    routes = SHOP.replace('primary = "a"', "primary = { a = 1, b = 1 }").replace('backups = ["b"]', 'copies = "others"')
    relay = relay_of(product, servers, f'{routes}split = "{split}"\n')
    assert relay.run("route", "weight", "shop", "a=1", "b=0", "--yes").returncode == 0
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say("RCPT TO:<one@shop.example>", 250)
        assert relay.run("route", "weight", "shop", "a=0", "b=1", "--yes", "--wait", "5s").returncode == 0
        client.say("RCPT TO:<two@shop.example>", 250)
        client.body(b"Subject: before\r\n\r\nx\r\n")
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say("RCPT TO:<three@shop.example>", 250)
        client.body(b"Subject: after\r\n\r\nx\r\n")
    for name in ("a", "b"):
        servers[name].wait_for(2)
        wanted = {"before": ["one@shop.example", "two@shop.example"], "after": ["three@shop.example"]}
        assert {m.header("Subject"): sorted(m.recipients) for m in servers[name].messages} == wanted
    answered = [event["primary"] for event in relay.events if event.get("event") == "accepted"]
    assert answered == ["a", "b"]


def test_the_mail_servers_of_a_domain_are_promoted(
    product: Make, servers: Servers, dns_server: Callable[..., DnsServer]
) -> None:
    """mx: stands wherever a server can; while DNS knows none, it is not promoted."""
    port = servers["b"].address.rpartition(":")[2]
    names = dns_server("example.net 1 MX 5 one.example.net.", "one.example.net 1 A 127.0.0.1")
    mx = f"mx:example.net:{port}?dns={names.address}"
    tables = file_of(servers, SHOP).replace(f'url = "{servers["b"].address}"', f'url = "{mx}"')
    relay = product(primary=f"old={servers['old'].address}", files={"settings.toml": tables}, settings=SETTINGS)
    done = relay.run("promote", "b", "--route", "shop", *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    send(relay, "one")
    assert subjects(servers["b"]) == ["one"]
    servers["a"].wait_for(1)
    assert relay.run("undo", "--yes").returncode == 0
    names.records.clear()
    servers["b"].down()
    refused = relay.run("promote", "b", "--route", "shop", *FORCED, "--wait", "10s")
    assert (refused.returncode, "cannot be used" in refused.stdout) == (1, True), refused.stdout + refused.stderr
    send(relay, "two")
    assert sorted(subjects(servers["a"])) == ["one", "two"]
