"""split = "fork": one message, several primaries; whoever has not taken it goes without nothing."""

from __future__ import annotations

import itertools
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay import faultpoints
from relay.ledger import overview
from support.postfix_instance import PostfixInstance
from support.product import SOON, Product
from support.reactions import Close, Gate, Reset, Silence
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]
Servers = dict[str, ScriptedServer]

SETTINGS = {
    "retry.first": "1",
    "retry.longest": "2",
    "relay.timeout_seconds": "2",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "relay.final_timeout_seconds": "3",
    "relay.uncertain_hold": "1",
}
FILE = """
[[server]]
name = "new"
url = "{new}"
[[server]]
name = "shop"
url = "{shop}"
[[backup]]
name = "archive"
url = "{archive}"
[[route]]
name = "moved"
match = {{ recipients = ["anna@example.com", "@moved.example"] }}
primary = "new"
backups = ["archive", "old"]
split = "fork"
[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "shop"
backups = ["archive"]
split = "fork"
[[route]]
name = "plain"
match = {{ recipients = "@plain.example" }}
primary = "shop"
backups = ["archive"]
"""
OLD, NEW, SHOP = "otto@example.com", "anna@example.com", "x@shop.example"


@pytest.fixture
def servers(scripted: MakeServer) -> Servers:
    return {name: scripted() for name in ("old", "new", "shop", "archive")}


def forking(product: Make, servers: Servers, **settings: str) -> Product:
    return product(
        primary=f"old={servers['old'].address}",
        files={"settings.toml": FILE.format(**{name: server.address for name, server in servers.items()})},
        settings=SETTINGS | settings,
    )


def is_drained(relay: Product) -> bool:
    with redis.Redis.from_url(relay.redis_url) as connection:
        rows = overview.summary(connection)
        left = connection.zcard("smtpdup:uncertain") + connection.zcard("smtpdup:staged")
    return not left and sum(row.pending for row in rows) == 0


def everything(server: ScriptedServer) -> list[tuple[str, tuple[str, ...]]]:
    """Return (Subject, recipients) of all that a server has taken."""
    return sorted((m.header("Subject") or repr(m.wire), tuple(sorted(m.recipients))) for m in server.messages)


def events(relay: Product, name: str) -> list[dict[str, object]]:
    return [e for e in relay.events if e.get("event") == name]


def test_each_primary_gets_its_recipients_and_each_backup_all_of_its_own(product: Make, servers: Servers) -> None:
    """One message, one 250: every recipient has one primary, whoever comes first, pipelined or not."""
    relay = forking(product, servers)
    servers["new"].replies["RCPT TO:<no@moved.example>"] = "550 5.1.1 the word of its own server"
    archive, old = servers["archive"], servers["old"]
    for number, order in enumerate(itertools.permutations((OLD, NEW, SHOP))):
        before = {name: len(server.connections) for name, server in servers.items()}
        _send_twice(relay, order, number)
        wait_until(lambda n=number: len(archive.messages) == 2 + 2 * n and len(old.messages) == 4 + 4 * n)
        wait_until(lambda: is_drained(relay))
        _each_has_its_own(servers, order, number)
        # The rules hold for what follows on the same connection, and connections are kept.
        assert all(len(servers[name].connections) <= before[name] + 3 for name in ("new", "shop")), order
        wait_until(lambda n=number: len(events(relay, "accepted")) == 2 + 2 * n)
    for server in servers.values():
        assert all(b"\r\n\r\n..one\r\n" in m.wire or "two" in (m.header("Subject") or "") for m in server.messages)
    assert relay.metric("smtpdup_split_total", how="fork") >= 4 * 6
    assert {frozenset(str(e["primary"]).split(",")) for e in events(relay, "accepted")} == {
        frozenset({"old", "new", "shop"})
    }


def _send_twice(relay: Product, order: tuple[str, ...], number: int) -> None:
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<s@example.org>", 250)
        for address in order:
            client.say(f"RCPT TO:<{address}>", 250)
        assert client.say("RCPT TO:<no@moved.example>", 550) == "550 5.1.1 the word of its own server"
        client.say("RCPT TO:<yes@moved.example>", 250)
        client.say("DATA", 354)
        client.say(f"Subject: {number} one\r\n\r\n..one\r\n.", 250)
        lines = ["MAIL FROM:<s@example.org>", *(f"RCPT TO:<{address}>" for address in order), "DATA"]
        client.raw("".join(f"{line}\r\n" for line in lines).encode())
        assert [client.reply()[:3] for _ in lines] == ["250"] * 4 + ["354"], order
        client.say(f"Subject: {number} two\r\n\r\ntwo\r\n.", 250)


def _each_has_its_own(servers: Servers, order: tuple[str, ...], number: int) -> None:
    def had(name: str) -> list[tuple[str, tuple[str, ...]]]:
        found = everything(servers[name])
        return [(text.partition(" ")[2], who) for text, who in found if text.startswith(f"{number} ")]

    assert had("new") == [("one", (NEW, "yes@moved.example")), ("two", (NEW,))], order
    assert had("shop") == [("one", (SHOP,)), ("two", (SHOP,))], order
    assert had("old") == [
        ("one", (NEW, "yes@moved.example")), ("one", (OLD,)), ("two", (NEW,)), ("two", (OLD,)),
    ], order  # fmt: skip
    assert had("archive") == [
        ("one", tuple(sorted([*order, "yes@moved.example"]))), ("two", tuple(sorted(order))),
    ], order  # fmt: skip


def test_whose_recipients_are_all_refused_has_not_answered(product: Make, servers: Servers) -> None:
    """Log and metrics name who has the message, not who was asked first."""
    relay = forking(product, servers)
    servers["old"].replies["RCPT"] = "550 5.1.1 no"
    with relay.dialogue() as client:
        client.hello()
        for end, last in ((None, "250"), ("450 4.2.0 later", "450")):
            if end:
                servers["new"].replies["."] = end
            client.say("MAIL FROM:<s@example.org>", 250)
            client.say(f"RCPT TO:<{OLD}>", "550 5.1.1 no")
            client.say(f"RCPT TO:<{NEW}>", 250)
            client.body(b"Subject: one\r\n\r\none\r\n", last)
    wait_until(lambda: events(relay, "accepted"))
    assert [(e["primary"], e["route"]) for e in events(relay, "accepted")] == [("new", "moved")]
    wait_until(lambda: relay.metric("smtpdup_route_refused_total", server="new") == 1)
    assert relay.metric("smtpdup_route_messages_total", server="new") == 1
    assert relay.metric("smtpdup_route_messages_total", server="old") == 0


def test_without_a_route_that_says_so_it_is_deferred(product: Make, servers: Servers) -> None:
    """Off by default: recipients of two routes of which none forks come by themselves."""
    relay = forking(product, servers)
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say(f"RCPT TO:<{OLD}>", 250)
        client.say("RCPT TO:<x@plain.example>", "452 4.5.3")
        client.say("DATA", 354)
        client.say("Subject: one\r\n\r\none\r\n.", 250)
    assert not servers["shop"].transactions
    assert relay.metric("smtpdup_split_total", how="defer") == 1
    done = relay.run("check")
    assert "moved, shop: a message for recipients of several primaries goes to each" in done.stdout
    assert "plain: recipients of one message" in done.stdout


# What one primary says at the end of a message that the other takes; whether its own client would hear it as final.
ENDS = {
    "4xx at the dot": ({".": ["451 4.7.1 later", None]}, "split copied"),
    "421 at the dot": ({".": [("421 4.3.2 down", Close()), None]}, "split copied"),
    "silence at the dot": ({".": [Silence(), None]}, "split copied"),
    "reset at the dot": ({".": [Reset(), None]}, "split copied"),
    "4xx at DATA": ({"DATA": ["451 4.3.0 later", None]}, "split copied"),
    "silence at DATA": ({"DATA": [Silence(), None]}, "split copied"),
    "close at DATA": ({"DATA": [Close(), None]}, "split copied"),
    "5xx at the dot": ({".": "550 5.7.1 never"}, "split refused"),
    "5xx at DATA": ({"DATA": "554 5.7.1 never"}, "split refused"),
}


@pytest.mark.parametrize("where", ["old", "new"])
@pytest.mark.parametrize("end", ENDS)
def test_one_has_it_and_the_other_does_not(product: Make, servers: Servers, end: str, where: str) -> None:
    """The client hears 250; the other gets a copy, and what it refuses for good is in its failed list."""
    replies, event = ENDS[end]
    relay = forking(product, servers)
    servers[where].replies |= replies
    recipient = OLD if where == "old" else NEW
    assert relay.send("s@example.org", OLD, NEW, data=b"Subject: one\r\n\r\none\r\n").startswith("250")
    relay.wait_for_log(event)
    (line,) = events(relay, event)
    assert (line["server"], line["recipients"]) == (where, 1)
    if event == "split refused":
        wait_until(lambda: line["copy"] in [f["id"] for f in relay.json("failed", "list", "--destination", where)])
        assert relay.metric("smtpdup_split_refused_total", server=where) == 1
        wait_until(lambda: "the dot: 55" in relay.run("trace", str(line["copy"])).stdout)
    else:
        wait_until(lambda: ("one", (recipient,)) in everything(servers[where]))
    servers["archive"].wait_for(1)
    wait_until(lambda: is_drained(relay))
    other, its = ("new", NEW) if where == "old" else ("old", OLD)
    took = {("moved", "new"), ("default", "old")} - {("moved", "new") if where == "new" else ("default", "old")}
    for route, server in itertools.product(("moved", "default"), ("old", "new", "new,old", "old,new")):
        counted = relay.metric("smtpdup_route_messages_total", route=route, server=server)
        assert counted == ((route, server) in took), (route, server)
    assert everything(servers[other]).count(("one", (its,))) == 1
    assert everything(servers["archive"]) == [("one", (NEW, OLD))]


def test_nobody_has_it(product: Make, servers: Servers) -> None:
    """Refusals of all are the client's, with the worst code and all texts; nothing is copied, and nothing is left."""
    relay = forking(product, servers)
    for old, new, expected in (
        ("451 4.7.1 old", "452 4.3.1 new", ("451", "4.7.1 old", "4.3.1 new")),
        ("451 4.7.1 old", "550 5.7.1 new", ("550", "5.7.1 new", "5.7.1 4.7.1 old")),
        ("550 5.7.1 same", "550 5.7.1 same", ("550", "5.7.1 same")),
    ):
        for key in (".", "DATA"):
            servers["old"].replies, servers["new"].replies = {key: old}, {key: new}
            with relay.dialogue() as client:
                client.hello()
                client.say("MAIL FROM:<s@example.org>", 250)
                client.say(f"RCPT TO:<{OLD}>", 250)
                client.say(f"RCPT TO:<{NEW}>", 250)
                reply = client.say("DATA")
                if key == ".":
                    assert reply.startswith("354")
                    reply = client.say("Subject: one\r\n\r\none\r\n.")
            assert all(text in reply for text in expected), reply
            assert reply.startswith(expected[0]), reply
    wait_until(lambda: is_drained(relay))
    assert not any(server.messages for server in servers.values())


def test_nobody_says_a_word(product: Make, servers: Servers) -> None:
    """Silence of one, a refusal of the other: it is uncertain, 451; the next try covers it, nothing comes twice."""
    relay = forking(product, servers, **{"relay.uncertain_hold": "30"})
    servers["old"].replies["."] = [Silence(), None]
    servers["new"].replies["."] = ["451 4.7.1 later", None]
    with relay.dialogue() as client:
        client.hello()
        for _ in range(2):
            client.say("MAIL FROM:<s@example.org>", 250)
            client.say(f"RCPT TO:<{OLD}>", 250)
            client.say(f"RCPT TO:<{NEW}>", 250)
            client.say("DATA", 354)
            reply = client.say("Subject: one\r\nMessage-ID: <1@example.org>\r\n\r\none\r\n.")
    assert reply.startswith("250"), relay.log
    assert len(events(relay, "uncertain")) == 1
    servers["archive"].wait_for(1)
    wait_until(lambda: len(servers["old"].messages) == 2)  # its own, and its copy for NEW
    assert everything(servers["archive"]) == [("one", (NEW, OLD))]
    assert everything(servers["new"]) == [("one", (NEW,))]


def test_a_primary_that_hangs_while_the_other_took_it(product: Make, servers: Servers) -> None:
    """Whether it has taken the message or not, it ends with it: twice at the most, and the log says why."""
    relay = forking(product, servers, **{"relay.final_timeout_seconds": "2"})
    gate = Gate()
    servers["new"].replies["."] = [(gate, None), None]  # it has it, but says so too late
    assert relay.send("s@example.org", OLD, NEW, data=b"Subject: one\r\n\r\none\r\n").startswith("250")
    gate.open()
    relay.wait_for_log("split copied")
    assert "may repeat" in str(events(relay, "split copied")[0]["reply"])
    wait_until(lambda: ("one", (NEW,)) in everything(servers["new"]))
    wait_until(lambda: is_drained(relay))
    assert 1 <= len(servers["new"].messages) <= 2


def test_a_primary_that_hangs_in_the_body(product: Make, servers: Servers) -> None:
    """It is not waited for as long as alone, since the client gives up on all: the other has it, it gets a copy."""
    relay = forking(product, servers, **{"relay.command_timeout_seconds": "4"})
    gate = Gate()
    servers["new"].in_data = (10_000, gate)  # reads no more
    large = b"Subject: large\r\n\r\n" + b"".join(b"%060d\r\n" % n for n in range(300_000))
    assert relay.send("s@example.org", OLD, NEW, data=large).startswith("250")
    assert [m.recipients for m in servers["old"].messages] == [[OLD]]
    servers["new"].in_data = None
    gate.open()
    relay.wait_for_log("split copied")
    wait_until(lambda: is_drained(relay))
    assert [(m.recipients, m.header("Subject")) for m in servers["new"].messages] == [([NEW], "large")]
    assert relay.metric("smtpdup_primary_trouble_total", stage="body") == 1


def test_a_primary_that_hangs_before_its_recipients(product: Make, servers: Servers) -> None:
    """Its recipients are put off, soon enough for the others of the message; it is asked once."""
    relay = forking(product, servers, **{"relay.greeting_timeout_seconds": "60", "relay.command_timeout_seconds": "2"})
    with relay.dialogue() as client:
        client.hello()
        servers["new"].replies["CONNECT"] = Silence()
        servers["new"].drop()
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say(f"RCPT TO:<{OLD}>", 250)
        client.say(f"RCPT TO:<{NEW}>", "451 4.4.1")
        client.say("RCPT TO:<other@moved.example>", "451 4.4.1")
        client.say("DATA", 354)
        client.say("Subject: one\r\n\r\none\r\n.", 250)
    assert everything(servers["old"]) == [("one", (OLD,))]


def test_chunks_utf8_and_size(product: Make, servers: Servers, scripted: MakeServer) -> None:
    """BDAT in several chunks, SMTPUTF8 addresses, a large body, and a body that one of them refuses on the way."""
    for server in servers.values():
        server.extensions.append("CHUNKING")
    relay = forking(product, servers)
    large = b"Subject: large\r\n\r\n" + b"x" * 70 + b"\r\n"
    large += b"".join(b"%060d\r\n" % n for n in range(30_000))
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<jürgen@example.org> BODY=8BITMIME SMTPUTF8", 250)
        client.say(f"RCPT TO:<{OLD}>", 250)
        client.say("RCPT TO:<用户@moved.example>", 250)
        body = "Subject: häh\r\n\r\n.x\r\n".encode()
        client.raw(b"BDAT %d\r\n" % len(body) + body)
        assert client.reply().startswith("250")
        client.raw(b"BDAT 5 LAST\r\n..y\r\n")
        assert client.reply().startswith("250")
    for name in ("old", "new"):
        (message,) = [m for m in servers[name].wait_for(1) if b"..x\r\n...y\r\n" in m.wire][:1]
        assert message.sender == "jürgen@example.org"
    servers["new"].in_data = (200_000, ("552 5.3.4 too large for me", Close()))
    assert relay.send("s@example.org", OLD, NEW, data=large).startswith("250")
    relay.wait_for_log("split refused")
    assert len([m for m in servers["old"].messages if m.header("Subject") == "large" and m.recipients == [OLD]]) == 1
    wait_until(lambda: relay.json("failed", "list", "--destination", "new"))


def test_where_nothing_can_be_stored_no_dot_is_sent(product: Make, servers: Servers) -> None:
    """Without Redis, and without room in the spool, the client hears 451, and nobody has the message."""
    relay = forking(product, servers)
    relay.send("first@example.org", OLD, data=b"Subject: first\r\n\r\nx\r\n")
    servers["archive"].wait_for(1)
    assert relay.stop() == 0
    relay.settings |= {"spool.min_free": "1000T", "redis.timeout_seconds": "1"}
    relay.start(wait=False)
    wait_until(lambda: len(events(relay, "relay started")) == 2)
    (server,) = relay.children("valkey-server|redis-server")
    server.signal(signal.SIGSTOP)
    try:
        with relay.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<s@example.org>", 250)
            client.say(f"RCPT TO:<{OLD}>", 250)
            client.say(f"RCPT TO:<{NEW}>", 250)
            client.say("DATA", 354)
            client.say("Subject: one\r\n\r\none\r\n.", "451 4.3.1")
    finally:
        server.signal(signal.SIGCONT)
    assert "one" not in [m.header("Subject") for name in ("old", "new") for m in servers[name].messages]


def test_in_the_spool_it_is_the_same(product: Make, servers: Servers) -> None:
    """While Redis hangs copies and spares are files; whoever has not taken the message gets it when that is over."""
    relay = forking(product, servers, **{"redis.timeout_seconds": "1"})
    servers["new"].replies["."] = ["451 4.7.1 later", None]
    (server,) = relay.children("valkey-server|redis-server")
    server.signal(signal.SIGSTOP)
    try:
        assert relay.send("s@example.org", OLD, NEW, data=b"Subject: one\r\n\r\none\r\n").startswith("250")
    finally:
        server.signal(signal.SIGCONT)
    relay.wait_for_log("split copied")
    servers["archive"].wait_for(1)
    servers["new"].wait_for(1)
    servers["old"].wait_for(2)
    wait_until(lambda: is_drained(relay), 60)
    assert everything(servers["old"]) == [("one", (NEW,)), ("one", (OLD,))]
    assert everything(servers["new"]) == [("one", (NEW,))]
    assert everything(servers["archive"]) == [("one", (NEW, OLD))]


POINTS = ["before staging", "staged", "dot sent", "leg answered", "primary answered", "released"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("turn", [0, 1], ids=["first leg", "second leg"])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(
    product: Make, servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, turn: int
) -> None:
    """SIGKILL of the relay process at this point, while one primary refuses now and then: nothing is lost anywhere."""
    reached = tmp_path / "reached"
    monkeypatch.setenv(faultpoints.VARIABLE, f"{point}:{10 + turn}:{reached}")
    servers["new"].replies["."] = ["451 4.7.1 later", None, None] * 10 + [None]
    relay = forking(product, servers, **{"retry.longest": "1", "workers.sweep": "1"})
    sender = Sender(relay.smtp_port, range(30), recipients=(OLD, NEW)).start()
    wait_until(reached.exists, 30, f"nobody reached {point!r}")
    os.kill(relay.child("relay-1").pid, signal.SIGKILL)
    assert sender.join() == set(range(30))
    wait_until(lambda: is_drained(relay), 60, lambda: f"not drained: {relay.log[-6000:]}")
    explained = {word for line in relay.log.splitlines() if "may repeat" in line or "uncertain" in line
                 for word in re.findall(r'"id": "(\w+)"', line)}  # fmt: skip
    for name, recipient in (("old", OLD), ("new", NEW), ("archive", OLD), ("archive", NEW)):
        found = Counter(int(m.header("Subject")) for m in servers[name].messages if recipient in m.recipients)
        assert set(found) == set(range(30)), f"{name} lacks {set(range(30)) - set(found)} for {recipient}"
        for number, count in found.items():
            assert count <= sender.attempts[number] or explained, f"{name} has {number} {count} times without a reason"


@pytest.mark.long
@pytest.mark.postfix
@pytest.mark.timeout(300)
def test_behind_postfix_with_kills_each_server_ends_with_what_it_owes(
    product: Make, servers: Servers, postfix: Callable[[PostfixInstance], PostfixInstance]
) -> None:
    """The relay is killed, then all of smtp-dup, and a leg is away: each server ends with the set that it is owed."""
    settings = {
        "relay.command_timeout_seconds": "10",
        "relay.final_timeout_seconds": "10",
        "relay.uncertain_hold": "5",
        "retry.first": "2s",
        "workers.sweep": "5",  # what is uncertain is covered by a sweep
    }
    relay = forking(product, servers, **settings)
    front = postfix(PostfixInstance.front(relay.smtp_port))
    kinds = [(OLD, NEW), (OLD, NEW, SHOP), (NEW, SHOP), (OLD,), (SHOP, OLD)]
    count = 400
    sender = Sender(front.port, range(count), recipients=lambda n: kinds[n % len(kinds)], patience=100).start()
    servers["shop"].replies["."] = [Silence(), Reset(), "451 4.3.0 later", ("421 4.3.2 bye", Close()), None]
    servers["old"].replies["DATA"] = [None, Silence(), Close(), "451 4.3.0 later", None]
    servers["old"].wait_for(20)
    os.kill(relay.child("relay-1").pid, signal.SIGKILL)
    servers["old"].wait_for(60)
    servers["new"].down()
    servers["old"].wait_for(100)
    servers["new"].listen()
    servers["new"].wait_for(40)
    relay.kill()
    relay.start()
    assert sender.join() == set(range(count))

    def is_empty() -> bool:
        front.flush()
        return front.queue_empty()

    wait_until(is_empty, 150, interval=3)
    wait_until(lambda: is_drained(relay), 60, lambda: f"not drained: {relay.json('queue', 'list')} {relay.log[-6000:]}")
    owed = {"old": (OLD, NEW), "new": (NEW,), "shop": (SHOP,), "archive": (OLD, NEW, SHOP)}
    for name, who in owed.items():
        due = {(n, address) for n in range(count) for address in kinds[n % len(kinds)] if address in who}
        taken = {(int(m.header("Subject")), address) for m in servers[name].messages for address in m.recipients}
        assert taken == due, name
