"""What `smtp-dup route ADDR` says of an address, beside what the relay does with it: for every form of address."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product as combinations

import pytest

from relay.cockpit.moves import Wish, wish
from relay.command import route
from relay.command.exit_status import WELL, Misuse
from relay.command.output import Output
from relay.config.loader import Settings, load
from relay.mail.address_keys import lookup_keys
from relay.smtpd.recipients import typed_path
from support.dialogue import Dialogue
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer

_ROUTES = r"""
[[route]]
name = "persons"
match = { recipients = ["anna@one.example", '"o dd"@one.example', "a.b@one.example", "jürgen@one.example",
                        "anna+own@one.example", "<>"] }
primary = "a"

[[route]]
name = "below"
match = { recipients = ["@.one.example", "@[192.0.2.1]", "@[IPv6:2001:db8::1]", "@xn--mnchen-3ya.example"] }
primary = "b"

[[route]]
name = "shared"
match = { recipients = ["@shared.example"] }
primary = { a = 1, b = 1, c = 1 }

[[route]]
name = "from"
match = { recipients = ["@one.example"], senders = ["chief@sender.example"] }
primary = "b"

[[route]]
name = "domain"
match = { recipients = ["@one.example", "@bücher.example"] }
primary = "c"
"""
_LOCALS = [
    "anna", "ANNA", "Anna+tag", "anna+", "+anna", "anna+own", "anna+own+more", "anna++", '"anna"', r'"an\na"',
    '"anna+tag"', '"o dd"', r'"o\ dd"', '"O DD"', "a.b", '"a.b"', "a..b", ".anna", "anna.", "jürgen",
    "ju\u0308rgen", "JÜRGEN", '"a@b"', "anna%two.example", "two.example!anna", "anna@two.example", r'"a\"b"', '""',
    "o'dd", "a/b", "a=b", "{anna}", "-anna", "*", "postmaster", "x" * 64, "x" * 300,
]  # fmt: skip
_DOMAINS = ["one.example", "ONE.Example", "one.example."]
_WHOLE = [
    "", "<>", "anna", "postmaster", "Postmaster", "@one.example", "anna@", "@", "anna@.one.example",
    "anna@sub.one.example", "anna@sub.sub.one.example.", "anna@one.example..", "anna@one..example",
    "anna@notone.example", "anna@[192.0.2.1]", "anna@[192.000.2.1]", "anna@[IPv6:2001:db8::1]",
    "anna@[ipv6:2001:DB8:0:0:0:0:0:1]", "anna@[IPv6:2001:0db8::0001]", "anna@[nonsense]", "anna@192.0.2.1",
    "anna@münchen.example", "anna@MÜNCHEN.example", "anna@xn--mnchen-3ya.example", "anna@XN--MNCHEN-3YA.EXAMPLE",
    "anna@mu\u0308nchen.example", "anna@bücher.example", "anna@xn--bcher-kva.example", "anna@bücher\u3002example",
    "anna@one\uff0eexample", "anna@straße.example", "@relay.example:anna@one.example",
    "@a.example,@b.example:anna@one.example", "@relay.example:anna", "@[192.0.2.1]:anna@one.example",
    "anna@one.example@two.example", "anna@two.example@one.example", "anna @one.example", " anna@one.example",
    "anna@one.example ", "anna@one.example>", "<anna@one.example", "anna@one.example\x7f", "an\tna@one.example",
    "an\x01na@one.example", '"an\tna"@one.example', "anna@" + "x" * 63 + ".example",
    "anna@" + "x" * 64 + ".example", "anna@" + "x." * 130 + "one.example", "\udcff@one.example",
    "anna@\udcff.one.example", "anna\u200b@one.example", "\uff41nna@one.example", "anna@\uff4fne.example",
    "\u0130@one.example", "anna@one.example BODY=8BITMIME", "anna@one.example NOTIFY=NEVER",
    "anna(comment)@one.example", "anna@(comment)one.example",
    *(f"{name}@shared.example" for name in ("anna", "ANNA", '"anna"', "anna+tag", "otto", "o.t", "1", "2", "jürgen")),
    "anna@SHARED.example", "anna@shared.example.", "@relay.example:anna@shared.example",
]  # fmt: skip
_FORMS = [*(f"{local}@{domain}" for local, domain in combinations(_LOCALS, _DOMAINS)), *_WHOLE]


def _as_the_relay_does(client: Dialogue, servers: dict[str, ScriptedServer], sender: str, address: str) -> str:
    """Name the server that hears RCPT for an address; "" if the relay itself refuses it."""
    before = {name: len(server.transactions) for name, server in servers.items()}
    client.say(f"MAIL FROM:<{sender}> SMTPUTF8", 250)
    reply = client.say(f"RCPT TO:<{address}>".encode("utf-8", "surrogateescape"))
    if not reply.startswith("250"):
        client.say("RSET", 250)
        return ""
    client.body(b"Subject: test\r\n\r\ntext\r\n")
    (found,) = [name for name, server in servers.items() if len(server.transactions) > before[name]]
    return found


def _as_the_command_says(settings: Settings, output: pytest.CaptureFixture[str], sender: str, address: str) -> str:
    """Name the server that the command names; "" if it says that this is no address."""
    try:
        status = route.show(
            settings, Output(as_json=True), address=address, sender=sender, client="127.0.0.1", listen=""
        )
    except Misuse:
        return ""
    assert status == WELL
    return str(json.loads(output.readouterr().out)["primary"])


def test_command_and_relay_agree(
    product: Callable[..., Product], scripted: Callable[..., ScriptedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """They name the same server, and what the relay takes for no address the command does not take for one either."""
    servers = {name: scripted() for name in ("old", "a", "b", "c")}
    tables = "".join(f'[[server]]\nname = "{n}"\nurl = "{s.address}"\n' for n, s in servers.items() if n != "old")
    relay = product(
        primary=f"old={servers['old'].address}",
        files={"settings.toml": tables + _ROUTES},
        settings={**QUICK, "relay.domains": ""},
    )
    settings = load(environ=relay.environment, directories=[relay.directory])
    differ = []
    with relay.dialogue() as client:
        client.hello()
        for number, address in enumerate(_FORMS):
            sender = ("x@sender.example", "chief@sender.example", "")[number % 3]
            does = _as_the_relay_does(client, servers, sender, address)
            says = _as_the_command_says(settings, capsys, sender, address)
            if does != says:
                differ.append((address, does, says))
    assert differ == []


def test_what_the_relay_refuses_by_itself_is_said(
    product: Callable[..., Product],
    scripted: Callable[..., ScriptedServer],
) -> None:
    """With a list of domains, or a client from elsewhere: the very reply that is heard, and status 1."""
    relay = product(
        primary=f"old={scripted().address}", settings={**QUICK, "smtp.allowed_domains": "one.example"}, files={}
    )
    with relay.dialogue() as client:
        client.hello()
        for address in (
            "anna@one.example",
            "postmaster",
            "anna@two.example",
            "anna%two.example@one.example",
            "x@ONE.example",
        ):
            client.say("MAIL FROM:<x@sender.example>", 250)
            heard = client.say(f"RCPT TO:<{address}>".encode())
            client.say("RSET", 250)
            done = relay.run("route", address, "--json")
            (row,) = map(json.loads, done.stdout.splitlines())
            assert (done.returncode, row["refused"].partition(": ")[0]) == (
                (0, "") if heard.startswith("250") else (1, heard.strip())
            )
    said = relay.run("route", "anna@two.example").stdout
    assert "Relaying to this domain is not allowed: smtp.allowed_domains; else\nroute    default\n" in said
    said = relay.run("route", "anna@one.example", "--client", "192.0.2.1", "--json").stdout
    assert (
        json.loads(said)["refused"] == "554 5.7.1 Client address not allowed: 192.0.2.1 is not in smtp.allowed_networks"
    )


def test_who_gets_no_copy_because_of_its_domains_is_not_named(
    product: Callable[..., Product], scripted: Callable[..., ScriptedServer]
) -> None:
    """Two new servers share the domains: each address names the one that the relay owes a copy."""
    news = {name: scripted() for name in ("new1", "new2")}
    backups = "".join(
        f'[[backup]]\nname = "{name}"\nurl = "{server.address}"\ndomains = ["{name}.example", "both.example"]\n'
        for name, server in news.items()
    )
    relay = product(primary=f"old={scripted().address}", files={"settings.toml": backups}, settings=QUICK)
    for domain, expected in {"new1": ["new1"], "NEW2": ["new2"], "both": ["new1", "new2"], "other": []}.items():
        (row,) = relay.json("route", f"anna@{domain}.example")
        assert row["backups"] == expected, domain
        relay.send("x@sender.example", f"anna@{domain}.example")
    for name, server in news.items():
        server.wait_for(2)
        got = sorted(str(message.recipients) for message in server.messages)
        assert [f"anna@{name}.example".lower() in got_.lower() or "both" in got_ for got_ in got] == [True, True]


def test_whoever_is_moved_is_found_by_the_relay() -> None:
    """`move ADDRESS` and `move --domain` take what a message can have, under the key of its look-up."""
    moved = [found for form in _FORMS if isinstance(found := wish(form, fold=True), Wish) and not form.startswith("@o")]
    assert len(moved) > 100
    for found in moved:
        assert lookup_keys(typed_path(found.text, "TO"), fold=True)[0] == found.key
    kept = ["anna", "anna@", '""@one.example', "an\x01na@one.example", "\udcff@one.example", "anna@\udcff.one.example",
            'an"na@one.example', "an>na@one.example", "anna@one.example NOTIFY=NEVER", "<anna@one.example"]  # fmt: skip
    assert [form for form in kept if isinstance(wish(form, fold=True), Wish)] == []
    for form in ("one.example", "ONE.example.", "@one.example", ".one.example", "b\xfccher.example", "[192.0.2.1]"):
        found = wish(form, fold=True, is_domain=True)
        assert isinstance(found, Wish), form
        assert found.key in lookup_keys(f"x@{'sub' * form.startswith('.')}{form.removeprefix('@')}", fold=True), form
    for form in ("\udcff.example", "xn--\udcff.example", "anna@one.example", "a b.example", "a>b.example", "a..b", "",
                 "*", "<>", "[nonsense]", "a,b.example", "x." * 130 + "one.example", "a\x01.example"):  # fmt: skip
        assert not isinstance(wish(form, fold=True, is_domain=True), Wish), form
