"""Mailbox by mailbox, on the running product: who answers for whom after a move, and that nothing is lost meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from support.dialogue import Unexpected
from support.product import SOON, Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON
HASTE = {"relay.daemon.ledger_redis._SPOOL_PATIENCE": 0.3}  # for a Redis that is not there

Make = Callable[..., Product]
Servers = dict[str, ScriptedServer]

QUICK = {"retry.first": "1", "retry.longest": "2", "relay.demoted": "sender=keep"}


@pytest.fixture
def servers(scripted: Callable[..., ScriptedServer]) -> Servers:
    return {name: scripted() for name in ("old", "new", "third")}


def migration(product: Make, servers: Servers, redis_url: str = "", **settings: str) -> Product:
    """Return the product as in the common migration: a primary, a backup, and no route."""
    return product(
        primary=f"old={servers['old'].address}",
        backups=[f"new={servers['new'].address}"],
        redis_url=redis_url,
        settings={**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}},
    )


def greets(relay: Product) -> bool:
    try:
        with relay.dialogue() as client:
            client.quit()
    except (OSError, Unexpected):
        return False
    return True


def answered(relay: Product) -> dict[str, str]:
    """Return who has accepted each message, by its sender."""
    return {e["sender"].strip("<>"): e.get("primary", "") for e in relay.events if e.get("event") == "accepted"}


def test_a_mailbox_moves_and_moves_back(product: Make, servers: Servers) -> None:
    """The new server answers for who has moved, the old one for others; both have everything, there and back."""
    relay = migration(product, servers, smtp__processes="2")
    relay.send("before@example.org", "anna@a.example", data=b"Subject: 0\r\n\r\n0\r\n")
    servers["new"].wait_for(1)
    *_, told, followed = relay.json("move", "Anna@A.example", "--to", "new", "--yes", "--note", "pilot")
    assert (told["kind"], told["generation"], told["count"]) == ("moved", 1, 1)
    assert (len(followed["followed"]), followed["late"]) == (2, [])
    relay.send("moved@example.org", "anna+tag@a.example", data=b"Subject: 1\r\n\r\n1\r\n")
    relay.send("other@example.org", "otto@a.example", data=b"Subject: 2\r\n\r\n2\r\n")
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<both@example.org>", 250)
        client.say("RCPT TO:<anna@a.example>", 250)
        client.say("RCPT TO:<otto@a.example>", "452 4.5.3 Recipient is on another server, send it by itself")
        client.say("DATA", 354)
        client.say("Subject: 3\r\n\r\n3\r\n.", 250)
    (row,) = relay.json("route", "anna+x@a.example")
    assert (row["route"], row["primary"], row["backups"]) == ("moved", "new", ["old"])
    assert "anna@a.example was moved by" in row["why"]
    assert row["why"].endswith(": pilot; else old, since no route matches: the default one")
    assert relay.json("moved", "show", "anna+x@a.example")[0]["entry"] == "anna@a.example"
    assert relay.json("topology")[0]["moved"] == {"generation": 1, "servers": {"new": 1}, "trouble": ""}
    assert relay.metric("smtpdup_moved_mailboxes", destination="new") == 1
    assert relay.metric("smtpdup_moved_followers") == 2
    assert "1 at new (generation 1), 2 relay processes follow" in relay.run("check").stdout
    wait_until(lambda: "new has answered for its mail" in relay.run("ready", "anna@a.example").stdout)
    (mailbox,) = relay.json("ready", "anna@a.example")
    assert mailbox["summary"] == "moved to new, all is well"
    assert [row["criterion"] for row in mailbox["criteria"]][-1] == "way back"
    assert relay.json("ready", "otto@a.example")[0]["summary"] == "READY for new"
    (every,) = relay.json("ready", "--moved")
    assert (every["subject"], every["summary"]) == ("1 address", "moved to new, all is well")
    relay.json("move", "anna@a.example", "--back", "--yes")
    relay.send("back@example.org", "anna@a.example", data=b"Subject: 4\r\n\r\n4\r\n")
    everything = [
        "back@example.org",
        "before@example.org",
        "both@example.org",
        "moved@example.org",
        "other@example.org",
    ]
    for name in ("old", "new"):
        servers[name].wait_for(5)
        assert sorted(t.sender for t in servers[name].messages) == everything
    found = answered(relay)
    assert (found["moved@example.org"], found["other@example.org"], found["both@example.org"]) == ("new", "old", "new")
    assert found["back@example.org"] in {"", "old"}
    (row,) = relay.json("route", "anna@a.example")
    assert (row["route"], row["primary"], row["backups"]) == ("default", "old", ["new"])
    acts = relay.json("audit")
    assert [act["command"] for act in acts] == ["move --back", "move"]
    assert acts[1]["details"]["addresses"] == "anna@a.example"


def test_a_batch_moves_whom_it_can_and_says_who_is_left(product: Make, servers: Servers, tmp_path: Path) -> None:
    """Faulty lines, a mailbox that the new server refused, one without an address: listed with the reason; exit 1."""
    servers["new"].replies["RCPT TO:<berta@"] = "550 5.1.1 no such mailbox"
    servers["new"].replies["RCPT TO:<carl@"] = "450 4.2.0 greylisted"
    relay = migration(product, servers, retry__first="5", retry__longest="10")
    relay.send("s@example.org", "anna@a.example", "berta@a.example", "carl@a.example")
    wait_until(lambda: relay.summary("new")["failed"] == 1 and relay.summary("new")["retrying"] == 1)
    file = tmp_path / "batch.csv"
    file.write_text(
        "email,server\nanna@a.example,\nBERTA@a.example,new\ncarl@a.example,new\n@b.example,new\nx y@a.example,\n"
        'dora@a.example,old\npostmaster,\n"""quoted x""@a.example",\nd\u00f6ra@b\u00fccher.example,\n'
    )
    dry = relay.run("move", "--file", str(file), "--to", "new", "--dry-run")
    assert dry.returncode == 1
    assert relay.run("move", "--file", str(file), "--to", "new").returncode == 2, "nobody to ask"
    assert relay.json("moved") == []
    done = relay.run("move", "--file", str(file), "--to", "new", "--yes", "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kept = {row["address"]: row["why"] for row in rows if row["kind"] == "not moved"}
    assert list(kept) == [
        "line 6: x y@a.example", "line 8: postmaster", "line 3: berta@a.example", "line 4: carl@a.example",
        "line 7: dora@a.example",
    ]  # fmt: skip
    assert "NOT READY for new: divergence and waiting" in relay.run("ready", "berta@a.example").stdout
    assert kept["line 3: berta@a.example"] == "1 copy failed at new: 550 5.1.1 no such mailbox"
    assert kept["line 4: carl@a.example"].startswith("1 copy waits for new, the oldest for ")
    moved = [row["address"] for row in relay.json("moved", "list", "--server", "new")]
    assert moved == ["@b.example", "anna@a.example", "d\u00f6ra@xn--bcher-kva.example", "quoted x@a.example"]
    assert next(row for row in rows if row["kind"] == "moved")["generation"] == 1, "all in one"
    again = relay.run("move", "anna@a.example", "--to", "new", "--yes")
    assert (again.returncode, relay.json("topology")[0]["moved"]["generation"]) == (0, 1)
    assert relay.run("move", "berta@a.example", "--to", "new", "--force", "--yes").returncode == 2, "a note is wanted"
    forced = relay.run("move", "berta@a.example", "--to", "new", "--force", "--yes", "--note", "hers is made today")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert relay.run("move", "x@a.example", "--to", "knew", "--yes").returncode == 2
    assert relay.run("move", "someone@b.example", "--back", "--yes").returncode == 1, "its domain has moved"
    for address, primary in (
        ("any+t@B.example", "new"), ("any@sub.b.example", "old"), ("dora@a.example", "old"), ("postmaster", "old"),
        ('"quoted x"@a.example', "new"), ("d\u00f6ra+x@b\u00fccher.example", "new"), ("Berta+1@A.EXAMPLE", "new"),
    ):  # fmt: skip
        assert relay.json("route", address)[0]["primary"] == primary, address


def test_redis_away_and_redis_emptied(
    product: Make, servers: Servers, redis_factory: Callable[..., RedisServer]
) -> None:
    """The last map holds, also over a restart, and move says 3; an emptied Redis moves nobody, and move repairs it."""
    server = redis_factory()
    relay = migration(product, servers, redis_url=server.url, smtp__processes="2")
    relay.json("move", "anna@a.example", "bert@a.example", "--to", "new", "--yes")
    server.stop()
    relay.waits |= HASTE
    relay.send("away@example.org", "anna@a.example", data=b"Subject: 1\r\n\r\n1\r\n")
    assert relay.run("move", "anna@a.example", "--back", "--yes").returncode == 3
    assert relay.stop() == 0
    relay.start(wait=False)
    wait_until(lambda: greets(relay), message=lambda: relay.log[-4000:])
    relay.send("restarted@example.org", "anna@a.example", data=b"Subject: 2\r\n\r\n2\r\n")
    assert {answered(relay)[f"{word}@example.org"] for word in ("away", "restarted")} == {"new"}

    server.start()
    relay.wait_ready()
    with server.client() as client:
        client.flushall()
    wait_until(lambda: relay.run("topology").returncode == 1)
    assert "it keeps generation 1 of who has moved: Redis has lost it" in relay.run("topology").stdout
    wait_until(lambda: "move --repair" in relay.get("/readyz")[1])
    relay.send("emptied@example.org", "anna@a.example", data=b"Subject: 3\r\n\r\n3\r\n")
    assert answered(relay)["emptied@example.org"] == "new"
    assert relay.run("moved", "export", "--format", "postfix").returncode == 1, "an empty map would send them back"
    done = relay.run("move", "carl@a.example", "--to", "new", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Put back 2 entries, generation 2." in done.stdout
    assert [row["address"] for row in relay.json("moved")] == [f"{who}@a.example" for who in ("anna", "bert", "carl")]
    assert relay.run("topology").returncode == 0
    assert relay.run("move", "--repair", "--yes").returncode == 0, "nothing is lost"


def test_a_damaged_copy_at_a_start_without_redis(
    product: Make, servers: Servers, redis_factory: Callable[..., RedisServer]
) -> None:
    """Nobody knows who has moved: former servers answer, it is said wherever one looks, and it mends itself."""
    server = redis_factory()
    relay = migration(product, servers, redis_url=server.url)
    relay.json("move", "anna@a.example", "--to", "new", "--yes")
    server.stop()
    relay.waits |= HASTE
    assert relay.stop() == 0
    for path in (relay.state_dir / "moved").glob("*.db"):
        path.write_bytes(b"rubbish" * 100)
    relay.start(wait=False)
    wait_until(lambda: greets(relay), message=lambda: relay.log[-4000:])
    relay.send("damaged@example.org", "anna@a.example")
    wait_until(lambda: "copy of who has moved cannot be used" in relay.get("/readyz")[1])
    shown = relay.run("route", "anna@a.example")
    assert (shown.returncode, "warning  this host's copy of who has moved cannot be used" in shown.stdout) == (1, True)
    assert "ERROR" not in shown.stderr
    server.start()
    relay.wait_ready()
    wait_until(lambda: [event.get("event") for event in relay.events].count("who has moved") == 2)
    relay.send("mended@example.org", "anna@a.example")
    found = answered(relay)
    assert (found["damaged@example.org"], found["mended@example.org"]) in {("old", "new"), ("", "new")}
    for name in ("old", "new"):
        servers[name].wait_for(2)
    assert relay.run("route", "anna@a.example").returncode == 0


def test_a_server_that_is_taken_out_while_mailboxes_are_there(product: Make, servers: Servers) -> None:
    """The former server answers, it is told, and everybody can be moved back without the server in the settings."""
    relay = migration(product, servers)
    relay.json("move", "anna@a.example", "bert@a.example", "--to", "new", "--yes")
    relay.settings["relay.destination_backups"] = ""
    assert relay.stop() == 0
    relay.start()
    relay.send("without@example.org", "anna@a.example")
    assert [m.sender for m in servers["old"].wait_for(1)] == ["without@example.org"]
    wait_until(lambda: "do not name new (2 mailboxes), to which they have moved" in relay.get("/readyz")[1])
    shown = relay.run("moved", "show", "anna@a.example").stdout
    assert "old: no server of these settings is called new" in shown
    assert "it gets copies" not in shown
    assert relay.run("move", "anna@a.example", "bert@a.example", "--back", "--yes").returncode == 0
    wait_until(lambda: relay.run("topology").returncode == 0)


def test_a_message_for_both_sides_goes_to_both_with_fork(product: Make, servers: Servers) -> None:
    """With routes.split = "fork" one transaction serves who has moved and who has not; each server has it once."""
    relay = migration(product, servers, routes__split="fork")
    relay.json("move", "anna@a.example", "--to", "new", "--yes")
    relay.send("s@example.org", "anna@a.example", "otto@a.example")
    (at_new,), (at_old,) = servers["new"].wait_for(1)[:1], servers["old"].wait_for(1)[:1]
    assert (at_new.recipients, at_old.recipients) == (["anna@a.example"], ["otto@a.example"])
    assert [t.recipients for t in servers["new"].wait_for(2)[1:]] == [["otto@a.example"]]
    assert [t.recipients for t in servers["old"].wait_for(2)[1:]] == [["anna@a.example"]]


def test_only_whoever_exists_there_moves_with_check(product: Make, servers: Servers) -> None:
    """Who has no mailbox at the new server stays where mail is taken, unless forced; who cannot be asked moves."""
    servers["new"].replies |= {
        "RCPT TO:<no-such-mailbox": "550 5.1.1 User unknown",
        "RCPT TO:<bert@a.example>": "550 5.1.1 <bert@a.example>: User unknown",
        "RCPT TO:<carl@a.example>": "450 4.2.0 greylisted",
    }
    relay = migration(product, servers)
    mailboxes = [f"{name}@a.example" for name in ("anna", "bert", "carl")]

    def moved() -> set[str]:
        return {who for who in mailboxes if relay.json("route", who)[0]["primary"] == "new"}

    def rcpt(who: str, code: int) -> str:
        with relay.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<s@example.org>", 250)
            return client.say(f"RCPT TO:<{who}>", code)

    dry = relay.run("move", *mailboxes, "--to", "new", "--check", "--dry-run")
    assert (dry.returncode, moved()) == (1, set()), dry.stdout
    assert "bert@a.example" in dry.stdout

    done = relay.run("move", *mailboxes, "--to", "new", "--check", "--yes", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1, "one was not moved"
    (kept,) = [row for row in rows if row["kind"] == "not moved"]
    assert kept["address"] == "bert@a.example"
    assert "does not exist: " in kept["why"]
    (plan,) = [row for row in rows if row["kind"] == "plan"]
    assert {row["address"]: row["result"] for row in plan["probed"]} == {
        "anna@a.example": "exists", "bert@a.example": "does not exist", "carl@a.example": "put off",
    }  # fmt: skip
    assert any("carl@a.example" in text and "greylisted" in text for text in plan["remarks"])
    assert moved() == {"anna@a.example", "carl@a.example"}
    rcpt("bert@a.example", 250)

    assert relay.run("move", "bert@a.example", "--to", "new", "--check", "--force", "--yes").returncode == 2, "no note"
    forced = relay.run("move", "bert@a.example", "--to", "new", "--check", "--force", "--note", "made today", "--yes")
    assert forced.returncode == 0, forced.stdout + forced.stderr
    assert "User unknown" in forced.stdout
    assert moved() == set(mailboxes)
    assert rcpt("bert@a.example", 550) == "550 5.1.1 <bert@a.example>: User unknown", "the new server's own word"
    assert relay.run("move", "bert@a.example", "--back", "--yes").returncode == 0
    rcpt("bert@a.example", 250)
    for name in ("new", "old"):
        assert not servers[name].messages, "nobody was sent a message to find out"
