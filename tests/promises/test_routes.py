"""Routes, on the running product: who answers for whom, who gets copies, and what a failover may not do."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.product import QUICK, SOON, Product
from support.reactions import Close, Reset, Silence
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

WAITS = {
    **SOON,
    "relay.routing.loading.LOOK_SECONDS": 0.5,  # at files of tables
    "relay.server.routes_in_use.LOOK_SECONDS": 0.5,
}

Make = Callable[..., Product]
Servers = dict[str, ScriptedServer]


def settings_file(servers: Servers, routes: str, backups: tuple[str, ...] = ()) -> str:
    tables = "".join(
        f'[[{"backup" if name in backups else "server"}]]\nname = "{name}"\nurl = "{server.address}"\n'
        for name, server in servers.items()
        if name != "old"
    )
    return f"{tables}\n{routes}"


@pytest.fixture
def servers(scripted: Callable[..., ScriptedServer]) -> Servers:
    return {name: scripted() for name in ("old", "new", "a", "b", "c")}


def with_routes(
    product: Make, servers: Servers, routes: str, backups: tuple[str, ...] = ("new",), **settings: str
) -> Product:
    """Return the product with these servers, "old" its primary, and these routes."""
    return product(
        primary=f"old={servers['old'].address}",
        files={"settings.toml": settings_file(servers, routes, backups)},
        settings={**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}},
    )


def senders(server: ScriptedServer) -> list[str]:
    return sorted(t.sender for t in server.messages)


def test_the_recipient_decides_who_answers_and_both_have_everything(
    product: Make, servers: Servers, tmp_path: Path
) -> None:
    """Mailbox by mailbox: the new server answers for those in a table, the old one for others; each has all mail."""
    table = tmp_path / "moved"
    table.write_text("# who has moved\nanna@example.com\n@moved.example\n")
    servers["new"].replies["RCPT TO:<anna+no@"] = "550 5.1.1 the new server's own word"
    routes = f"""
    [[route]]
    name = "moved"
    match = {{ recipients = "file:{table}" }}
    primary = "new"
    backups = ["old"]
    """
    relay = with_routes(product, servers, routes)
    relay.send("to-new@example.org", "Anna@Example.COM", data=b"Subject: 1\r\n\r\n1\r\n")
    relay.send("to-old@example.org", "otto@example.com", data=b"Subject: 2\r\n\r\n2\r\n")
    relay.send("tag-to-new@example.org", "anna+tag@example.com", data=b"Subject: 3\r\n\r\n3\r\n")
    everything = ["tag-to-new@example.org", "to-new@example.org", "to-old@example.org"]
    for name in ("old", "new"):
        servers[name].wait_for(3)
        assert senders(servers[name]) == ([s if s == "to-old@example.org" or name == "new" else "" for s in everything]
                                          if name == "new" else ["", "", "to-old@example.org"])  # fmt: skip
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<x@example.org>", "250 2.1.0")
        assert client.say("RCPT TO:<anna+no@example.com>", 550) == "550 5.1.1 the new server's own word"
    accepted = {e["sender"]: e for e in relay.events if e.get("event") == "accepted"}
    assert (accepted["<to-new@example.org>"]["route"], accepted["<to-new@example.org>"]["primary"]) == ("moved", "new")
    assert (accepted["<to-old@example.org>"]["route"], accepted["<to-old@example.org>"]["primary"]) == (
        "default",
        "old",
    )
    wait_until(lambda: relay.run("trace", "to-new@example.org").returncode == 0)
    (told,) = relay.json("trace", "to-new@example.org")
    assert (told["route"], told["primary"]) == ("moved", "new")
    wait_until(lambda: "moved" in relay.run("flow", "--minutes", "5").stdout)
    assert relay.json("flow", "--minutes", "5", "--route", "moved")[-1] | {"start": 0} == {
        "start": 0, "length": 60, "route": "moved", "server": "new", "accepted": 2, "refused": 0,
    }  # fmt: skip
    assert relay.run("flow", "--route", "nowhere").returncode == 2
    measured = [
        line for line in relay.get("/metrics")[1].splitlines() if line.startswith("smtpdup_server_seconds_count")
    ]
    assert measured == [
        'smtpdup_server_seconds_count{server="new"} 2.0',
        'smtpdup_server_seconds_count{server="old"} 1.0',
    ]
    (row,) = relay.json("route", "anna+x@example.com")
    assert (row["route"], row["primary"], row["backups"]) == ("moved", "new", ["old"])
    assert row["why"] == f"anna@example.com in {table}:2"


def test_recipients_of_another_primary_are_put_off(product: Make, servers: Servers) -> None:
    """Those of the first recipient's primary go on, the others hear 452 4.5.3; pipelined or not, nobody gets both."""
    routes = """
    [[route]]
    name = "shop"
    match = { recipients = ["@shop.example", "@.shop.example"] }
    primary = "a"
    backups = ["c"]
    """
    relay = with_routes(product, servers, routes)
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<one@example.org>", 250)
        client.say("RCPT TO:<x@shop.example>", 250)
        client.say("RCPT TO:<y@example.com>", "452 4.5.3 Recipient is on another server, send it by itself")
        client.say("RCPT TO:<z@sub.shop.example>", 250)
        client.say("DATA", 354)
        client.say("Subject: one\r\n\r\none\r\n.", 250)
        client.send(
            b"MAIL FROM:<two@example.org>\r\nRCPT TO:<y@example.com>\r\nRCPT TO:<x@shop.example>\r\n"
            b"RCPT TO:<w@example.com>\r\nDATA\r\n"
        )
        replies = [client.reply() for _ in range(5)]
        assert [reply[:3] for reply in replies] == ["250", "250", "452", "250", "354"]
        client.say("Subject: two\r\n\r\ntwo\r\n.", 250)
    (one,) = servers["a"].wait_for(1)
    assert one.recipients == ["x@shop.example", "z@sub.shop.example"]
    assert servers["c"].wait_for(1)[0].recipients == ["x@shop.example", "z@sub.shop.example"]
    (two,) = servers["old"].wait_for(1)
    assert two.recipients == ["y@example.com", "w@example.com"]
    assert [t.sender for t in servers["new"].wait_for(1)] == ["two@example.org"]
    wait_until(lambda: relay.metric("smtpdup_split_total", how="defer") == 2)


def test_a_refused_first_recipient_does_not_hold_the_others(product: Make, servers: Servers) -> None:
    """Whose first recipients are all refused has no primary as yet: the next one picks it, pipelined or not."""
    routes = """
    [[route]]
    name = "shop"
    match = { recipients = "@shop.example" }
    primary = "a"
    """
    servers["a"].replies["RCPT"] = "550 5.1.1 nobody here"
    relay = with_routes(product, servers, routes)
    with relay.dialogue() as client:
        client.hello()
        for n in range(2):
            client.say(f"MAIL FROM:<s{n}@example.org>", 250)
            client.say("RCPT TO:<x@shop.example>", 550)
            client.say("RCPT TO:<y@shop.example>", 550)
            client.say("RCPT TO:<z@example.com>", 250)
            client.say("RCPT TO:<x@shop.example>", "452 4.5.3 Recipient is on another server")
            client.say("DATA", 354)
            client.say("Subject: x\r\n\r\nx\r\n.", 250)
        client.send("MAIL FROM:<s2@example.org>", "RCPT TO:<x@shop.example>", "RCPT TO:<z@example.com>", "DATA")
        assert [client.reply()[:3] for _ in range(4)] == ["250", "550", "250", "354"]
        client.say("Subject: x\r\n\r\nx\r\n.", 250)
    assert [t.recipients for t in servers["old"].wait_for(3)] == [["z@example.com"]] * 3
    assert not servers["a"].messages


def test_a_copy_is_owed_to_those_of_its_route_only(product: Make, servers: Servers) -> None:
    """One primary for two routes: MAIL goes through at once, and each backup gets its own recipients of one message."""
    routes = """
    [[route]]
    name = "shop"
    match = { recipients = "@shop.example" }
    primary = "old"
    backups = ["c"]
    """
    servers["old"].replies["MAIL FROM:<no@"] = "550 5.7.1 the word of the primary"
    relay = with_routes(product, servers, routes)
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<no@example.org>", "550 5.7.1 the word of the primary")
        client.mail("yes@example.org", "x@shop.example", "y@example.com")
    assert servers["old"].wait_for(1)[0].recipients == ["x@shop.example", "y@example.com"]
    assert servers["c"].wait_for(1)[0].recipients == ["x@shop.example"]
    assert servers["new"].wait_for(1)[0].recipients == ["y@example.com"]


def test_senders_clients_and_ports_decide_at_mail(product: Make, servers: Servers) -> None:
    """Fields are joined by and, entries of a field by or; without recipients the primary itself answers MAIL."""
    second = free_port()
    routes = f"""
    [[route]]
    name = "port"
    match = {{ listen = ":{second}", clients = ["127.0.0.0/8"] }}
    primary = "a"
    [[route]]
    name = "sender"
    match = {{ senders = ["@news.example", "<>"], clients = ["192.0.2.0/24", "127.0.0.1"] }}
    primary = "b"
    """
    servers["b"].replies["MAIL FROM:<no@"] = "451 4.7.1 the word of b"
    relay = product(
        primary=f"old={servers['old'].address}",
        files={"settings.toml": settings_file(servers, routes)},
        settings=QUICK,
        start=False,
    )
    relay.settings["smtp.listen"] += f",127.0.0.1:{second}"
    relay.start()
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<no@news.example>", "451 4.7.1 the word of b")
        client.mail("n@news.example", "x@example.com")
        client.mail("", "x@example.com")
        client.mail("else@example.org", "x@example.com")
    with socket.create_connection(("127.0.0.1", second)) as sock, sock.makefile("rb") as lines:
        for line, code in (
            (b"", b"220"), (b"EHLO x\r\n", b"250"), (b"MAIL FROM:<n@news.example>\r\n", b"250"),
            (b"RCPT TO:<x@example.com>\r\n", b"250"), (b"DATA\r\n", b"354"), (b"Subject: x\r\n\r\nx\r\n.\r\n", b"250"),
        ):  # fmt: skip
            sock.sendall(line)
            while (got := lines.readline())[3:4] == b"-":
                pass
            assert got.startswith(code), got
    assert len(servers["a"].wait_for(1)) == 1
    assert senders(servers["b"]) == ["", "n@news.example"]
    assert senders(servers["old"]) == ["else@example.org"]


FAULTS = {
    "nobody listens": lambda s: s.down(),
    "421 greeting": lambda s: s.replies.update({"CONNECT": "421 4.3.2 going down"}),
    "silence": lambda s: s.replies.update({"CONNECT": Silence()}),
    "reset at EHLO": lambda s: s.replies.update({"EHLO": Reset()}),
    "421 at MAIL": lambda s: s.replies.update({"MAIL": ("421 4.3.2 going down", Close())}),
    "silence at MAIL": lambda s: s.replies.update({"MAIL": Silence()}),
    "reset at MAIL": lambda s: s.replies.update({"MAIL": Reset()}),
}

REDUNDANT = """
[[route]]
name = "all"
servers = ["a", "b", "c"]
copies = "others"
return_after = "0"
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_cannot_be_used_is_replaced_by_the_next(product: Make, servers: Servers, fault: str) -> None:
    """The next server answers, all others get a copy, and no message is at two primaries."""
    relay = with_routes(product, servers, REDUNDANT, backups=())
    relay.send("zero@example.org", "x@example.com")
    servers["a"].wait_for(1)
    FAULTS[fault](servers["a"])
    servers["a"].drop()
    for n in range(3):
        assert relay.send(f"m{n}@example.org", "x@example.com").startswith("250")
    servers["b"].wait_for(4)
    assert senders(servers["b"]) == ["m0@example.org", "m1@example.org", "m2@example.org", "zero@example.org"]
    assert len(servers["a"].messages) == 1
    lines = [e for e in relay.events if e.get("event") == "failover"]
    assert [(e["route"], e["server"], e["to"]) for e in lines] == [("all", "a", "b")], lines
    wait_until(lambda: relay.metric("smtpdup_failovers_total", server="a", to="b") == 1)
    # It is back: its copies are waiting, and no server misses a message.
    servers["a"].replies.clear()
    servers["a"].listen()
    for name in ("a", "b", "c"):
        servers[name].wait_for(4)
        assert senders(servers[name]) == ["m0@example.org", "m1@example.org", "m2@example.org", "zero@example.org"]

    def answered_by() -> list[str]:
        return [e["primary"] for e in relay.events if e.get("event") == "accepted"]

    def is_used_again() -> bool:
        relay.send("later@example.org", "x@example.com")
        return answered_by()[-1] == "a"

    wait_until(is_used_again)
    relay.wait_for_log("primary back")
    assert answered_by()[:4] == ["a", "b", "b", "b"]
    assert set(answered_by()) == {"a", "b"}
    assert not [e for e in relay.events if "may repeat" in str(e.get("event"))]


@pytest.mark.parametrize("reply", ["450 4.7.1 later", "550 5.7.1 never", "451 4.3.0 busy"])
def test_a_refusal_is_no_failover(product: Make, servers: Servers, reply: str) -> None:
    """Any other 4xx or 5xx to MAIL, RCPT, DATA or the dot is that server's word, and the client hears it."""
    relay = with_routes(product, servers, REDUNDANT, backups=())
    servers["a"].replies |= {"MAIL FROM:<m@": reply, "RCPT TO:<r@": reply, ".": [reply, None]}
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<m@example.org>", reply)
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say("RCPT TO:<r@example.com>", reply)
        client.say("RCPT TO:<ok@example.com>", 250)
        client.say("DATA", 354)
        client.say("Subject: x\r\n\r\nx\r\n.", reply)
    assert not servers["b"].transactions
    assert not servers["c"].transactions
    assert not [e for e in relay.events if e.get("event") == "failover"]


def test_all_down_is_451_and_after_mail_there_is_no_failover(product: Make, servers: Servers) -> None:
    """A primary that is lost after its 2xx to MAIL is 451, not another primary; with all down too, as ever."""
    relay = with_routes(product, servers, REDUNDANT, backups=())
    servers["a"].replies["."] = Close()
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<lost@example.org>", 250)
        client.say("RCPT TO:<x@example.com>", 250)
        client.say("DATA", 354)
        client.say("Subject: x\r\n\r\nx\r\n.", "451 4.4.2")
    assert not servers["b"].transactions
    for name in ("a", "b", "c"):
        servers[name].down()
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<x@example.org>", "451 4.4.1")
    servers["c"].listen()
    with relay.dialogue() as client:
        client.hello()
        wait_until(lambda: client.say("MAIL FROM:<y@example.org>")[:3] == "250")


def test_weights_share_out_and_stick_to_the_mailbox(product: Make, servers: Servers) -> None:
    """Mail for one mailbox always goes to one server, with or without tag; all of them share it by their weights."""
    routes = """
    [[route]]
    name = "balanced"
    primary = { a = 3, b = 1 }
    """
    relay = with_routes(product, servers, routes, backups=())
    with relay.dialogue() as client:
        client.hello()
        for n in range(80):
            client.mail("s@example.org", f"user{n}@example.com")
            client.mail("s@example.org", f"User{n}+tag@Example.com")
    where = {name: {t.recipients[0].lower().replace("+tag", "") for t in servers[name].messages} for name in ("a", "b")}
    assert not where["a"] & where["b"]
    assert len(where["a"] | where["b"]) == 80
    assert 45 <= len(where["a"]) <= 75
    assert len(servers["a"].messages) + len(servers["b"].messages) == 160


def test_ehlo_announces_what_all_primaries_offer(
    product: Make, servers: Servers, scripted: Callable[..., ScriptedServer]
) -> None:
    """SIZE is the smallest, and what one of them lacks is not announced."""
    servers["a"] = scripted(extensions=["PIPELINING", "SIZE 5000000", "8BITMIME"])
    routes = """
    [[route]]
    name = "shop"
    match = { recipients = "@shop.example" }
    primary = "a"
    """
    relay = with_routes(product, servers, routes)
    with relay.dialogue() as client:
        offered = client.hello()
        client.say("MAIL FROM:<x@example.org> SMTPUTF8", 555)
        client.say("MAIL FROM:<x@example.org> SIZE=1000", 250)
    assert offered["SIZE"] == "5000000"
    assert "SMTPUTF8" not in offered


def test_a_table_that_changes_is_taken_and_a_bad_one_is_refused(
    product: Make, servers: Servers, tmp_path: Path
) -> None:
    """A changed file counts after seconds; one with a fault, or suddenly empty, is refused whole: the old one stays."""
    table = tmp_path / "moved.csv"
    rows = [f"user{n}@example.com,new" for n in range(150)]
    table.write_text("email,server\n" + "\n".join(rows) + "\n")
    routes = f"""
    [[route]]
    name = "moved"
    match = {{ recipients = "file:{table}" }}
    primary = "old"
    backups = []
    """
    relay = with_routes(product, servers, routes)
    relay.send("first@example.org", "user1@example.com")
    assert servers["new"].wait_for(1)[0].sender == "first@example.org"
    table.write_text("email,server\nuser1@example.com,nobody\nuser2@example.com,new\n,new\n")
    relay.wait_for_log("table refused")
    wait_until(lambda: "line 2: user1@example.com" in relay.get("/readyz")[1])
    status, text = relay.get("/readyz")
    assert status == 200
    assert "line 4" in text
    relay.send("second@example.org", "user1@example.com")
    servers["new"].wait_for(2)
    table.write_text("email,server\n")
    done = relay.run("reload")
    assert done.returncode == 2
    assert "it is empty, and had 150 keys" in done.stderr
    relay.send("third@example.org", "user1@example.com")
    servers["new"].wait_for(3)
    done = relay.run("reload", "--allow-empty")
    assert done.returncode == 0, done.stderr

    def answers() -> bool:
        before = len(servers["old"].messages)
        relay.send(f"s{time.monotonic_ns()}@example.org", "user1@example.com")
        return len(servers["old"].messages) > before

    wait_until(answers)
    wait_until(lambda: json.loads(relay.get("/readyz")[1])["warnings"] == [])


def test_a_stored_message_owes_what_its_route_said(product: Make, servers: Servers) -> None:
    """What is owed stands in the envelope: other routes at the next start change nothing for what waits."""
    routes = """
    [[route]]
    name = "shop"
    match = { recipients = "@shop.example" }
    primary = "a"
    backups = ["c"]
    """
    servers["c"].down()
    relay = with_routes(product, servers, routes)
    relay.send("s@example.org", "x@shop.example")
    assert relay.stop() == 0
    (relay.directory / "settings.toml").write_text(settings_file(servers, routes.replace('"c"', '"b"'), ("new",)))
    servers["c"].listen()
    relay.start()
    assert servers["c"].wait_for(1)[0].recipients == ["x@shop.example"]
    relay.send("later@example.org", "x@shop.example")
    servers["b"].wait_for(1)
    assert senders(servers["c"]) == ["s@example.org"]


def test_every_fault_is_told_at_once_at_start_and_reload(product: Make, servers: Servers, tmp_path: Path) -> None:
    """A table's faults stop a start, and a reload changes nothing; each has a line with its place."""
    table = tmp_path / "transport"
    table.write_text("a@example.com smtp:[nowhere.example]:25\n/regexp/ new\nfine@example.com new\n")
    routes = f"""
    [[route]]
    name = "moved"
    match = {{ recipients = "file:{table}" }}
    primary = "new"
    """
    files = {"settings.toml": settings_file(servers, routes, ("new",))}
    relay = product(primary=f"old={servers['old'].address}", files=files, settings=QUICK, start=False)
    relay.start(wait=False)
    assert relay.wait() == 2
    assert f"{table}: line 1: a@example.com: " in relay.log
    assert f"{table}: line 2: /regexp/: " in relay.log
    table.write_text("fine@example.com new\n")
    relay.start()
    text = (relay.directory / "settings.toml").read_text().replace('primary = "new"', 'primary = "nowhere"')
    (relay.directory / "settings.toml").write_text(text)
    done = relay.run("reload")
    assert done.returncode == 2
    assert 'no server is named "nowhere"' in done.stderr
    relay.send("s@example.org", "fine@example.com")
    servers["new"].wait_for(1)


def test_check_shows_the_routes_and_the_tables(product: Make, servers: Servers, tmp_path: Path) -> None:
    table = tmp_path / "moved"
    table.write_text("anna@example.com\n")
    os.utime(table, (1_700_000_000, 1_700_000_000))
    routes = f"""
    [[route]]
    name = "moved"
    match = {{ recipients = "file:{table}" }}
    primary = "new"
    backups = ["old"]
    """
    relay = with_routes(product, servers, routes)
    done = relay.run("check", "--wide")
    assert f"recipients=file:{table} -> new backups=old" in done.stdout
    assert f"1 key, of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(1_700_000_000))}" in done.stdout
    assert "get 452 and come by themselves" in done.stdout
