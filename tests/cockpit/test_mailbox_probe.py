"""Whether mailboxes exist at a server: what each of its replies is taken to mean, and how modest the question is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from relay.cockpit import mailbox_probe, probed_moves
from relay.cockpit.finding import Result
from relay.cockpit.mailbox_probe import Exists, Manner, Probed
from relay.config.loader import Settings
from relay.mail.destination import Destination
from support.ledger_contents import settings
from support.reactions import Close, Moment, Silence
from support.scripted_server import EXTENSIONS, ScriptedServer

_NOBODY = {"RCPT TO:<no-such-mailbox-": "550 5.1.1 no such user"}


def ask(server: ScriptedServer, *addresses: str, known: Settings | None = None) -> dict[str, Probed]:
    found = probed_moves.probe(known or settings(), server.destination("new"), addresses)
    assert [one.address for one in found] == list(addresses)
    said = [line.upper() for connection in server.connections for line in connection.commands]
    assert not any(line.startswith(("DATA", "BDAT")) for line in said)
    assert all(line == "MAIL FROM:<>" or line.startswith("MAIL FROM:<> ") for line in said if line.startswith("MAIL"))
    return {one.address: one for one in found}


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ("250 2.1.5 ok", Exists.YES),
        ("251 2.1.5 forwarded", Exists.YES),
        ("550 5.1.1 no such user", Exists.NO),
        ("550 No such user here", Exists.NO),
        ("550 5.2.1 mailbox disabled", Exists.NO),
        ("554 5.7.1 relay access denied", Exists.REFUSED),
        ("450 4.2.0 greylisted", Exists.PUT_OFF),
        ("451 4.3.0 try again", Exists.PUT_OFF),
        ("421 4.7.0 go away", Exists.UNTOLD),
        (Close(), Exists.UNTOLD),
    ],
)
def test_what_a_reply_means(scripted: Callable[..., ScriptedServer], reply: object, result: Exists) -> None:
    """Yes, no, refused for another reason; whatever is temporary says nothing."""
    found = ask(scripted({**_NOBODY, "RCPT TO:<ann@": reply}), "ann@a.example")["ann@a.example"]
    assert found.result is result
    is_kept = probed_moves.judged(found, "new").result is Result.FAIL
    assert is_kept == (result in {Exists.NO, Exists.REFUSED})


def test_a_server_that_accepts_anything(scripted: Callable[..., ScriptedServer]) -> None:
    """Its yes says nothing, its no does; each domain is judged by itself."""
    server = scripted({"RCPT TO:<bad@": "550 5.1.1 no", "RCPT TO:<no-such-mailbox-": "250 2.1.5 ok"})
    found = ask(server, "ann@a.example", "bad@a.example", "bob@b.example")
    assert [one.result for one in found.values()] == [Exists.UNTOLD, Exists.NO, Exists.UNTOLD]
    assert "accepts anything" in found["ann@a.example"].text


def test_a_server_that_cannot_say(scripted: Callable[..., ScriptedServer]) -> None:
    """No null sender, silence, nobody there, a domain: unknown, with the reason; later addresses are not asked."""
    refusing = scripted({"MAIL": "550 5.7.1 no null sender here"})
    assert "refuses MAIL FROM:<>" in ask(refusing, "ann@a.example")["ann@a.example"].text
    known = settings(relay_command_timeout_seconds="0.3", relay_timeout_seconds="0.3")
    silent = scripted({**_NOBODY, "RCPT TO:<ann@": Silence()})
    found = ask(silent, "ann@a.example", "bob@a.example", known=known)
    assert {one.result for one in found.values()} == {Exists.UNTOLD}
    gone = Destination(name="new", host="127.0.0.1", port=1)
    (one,) = probed_moves.probe(settings(), gone, ["ann@a.example"])
    assert (one.result, "cannot be used" in one.text) == (Exists.UNTOLD, True)
    assert ask(scripted(_NOBODY), "@a.example")["@a.example"].result is Exists.UNTOLD


def test_it_is_modest(scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty addresses a connection, one connection at a time, a control a domain, no more than so many."""
    monkeypatch.setattr(probed_moves, "MOST", 45)
    server = scripted(_NOBODY, max_connections=1)
    found = ask(server, *(f"u{n}@a.example" for n in range(50)))
    assert sum(one.result is Exists.YES for one in found.values()) == 45
    assert "not asked" in found["u49@a.example"].text
    said = [[line for line in one.commands if line.upper().startswith("RCPT")] for one in server.connections]
    assert [len(lines) for lines in said] == [21, 20, 5]


def test_addresses_as_they_stand_on_the_wire(scripted: Callable[..., ScriptedServer]) -> None:
    """Quotes where they are needed: nothing in a local part ends the command or names another mailbox."""
    server = scripted(_NOBODY)
    ask(server, "a b@a.example", 'a">@a.example', "ann+x@a.example", "ü@a.example")
    said = "\n".join(line for one in server.connections for line in one.commands)
    for wire in ('<"a b"@a.example>', '<"a\\">"@a.example>', "<ann+x@a.example>", "<ü@a.example>"):
        assert f"RCPT TO:{wire}" in said


# The probe of a whole list --------------------------------------------------------------------------------------------


def probe(server: ScriptedServer, *addresses: str, **manner: Any) -> tuple[dict[str, Exists], str, list[int]]:
    """Ask as `smtp-dup probe` does; returns the results, why it ended early, and how many waited each time."""
    found: dict[str, Exists] = {}
    waited: list[int] = []
    asking = mailbox_probe.MailboxProbe(
        settings(smtp_domain="relay.example"),
        server.destination("new"),
        Manner(**{"sender": "postmaster@relay.example", "most_alike": 20, **manner}),
        lambda one: found.__setitem__(one.address, one.result),
        lambda number, _seconds: waited.append(number),
    )
    asyncio.run(asking.ask(addresses))
    assert not any(line.upper().startswith(("DATA", "BDAT")) for line in server.commands)
    return found, asking.trouble, waited


def rcpts(server: ScriptedServer) -> list[int]:
    return [sum(line.startswith("RCPT") for line in one.commands) for one in server.connections]


def many(number: int) -> list[str]:
    return [f"u{n}@a.example" for n in range(number)]


@pytest.mark.parametrize(
    ("reply", "why", "asked"),
    [
        ("421 4.3.2 closing", "broke off: RCPT: it closes (421", 2),
        ("450 4.7.1 Error: too many errors, slow down", "asks us to slow down: 450", 2),
        ("554 5.7.1 relay access denied", "has refused 20 in a row", 21),
        ("550 5.1.1 <{}>: no such user", "has refused 20 in a row", 21),
        (Close(), "broke off", 2),
    ],
)
def test_it_stops_where_the_server_wants_to_be_left_alone(
    scripted: Callable[..., ScriptedServer], reply: object, why: str, asked: int
) -> None:
    """At a 421, at "too many", at 20 refusals in the same words; whoever was not asked has no answer."""

    def say(moment: Moment) -> object:
        return reply.format(moment.line[9:-1]) if isinstance(reply, str) else reply

    server = scripted({**_NOBODY, "RCPT TO:<u": say})
    found, trouble, _ = probe(server, *many(25))
    assert why in trouble
    assert len(found) == (20 if "in a row" in why else 0)
    assert sum(rcpts(server)) == asked, "with the control"


def test_a_long_list_of_those_who_do_not_exist(scripted: Callable[..., ScriptedServer]) -> None:
    """After a yes, or where refusals are what is looked for, they are results; a connection ends before Postfix's."""
    server = scripted({**_NOBODY, "RCPT TO:<u": "550 5.1.1 no such user"})
    found, trouble, _ = probe(server, "ann@a.example", *many(30))
    assert (trouble, list(found.values()).count(Exists.NO), found["ann@a.example"]) == ("", 30, Exists.YES)
    assert max(rcpts(server)) <= 11  # nine of them refused, and the control of the domain
    sought, trouble, _ = probe(server, *many(30), wants_refusals=True)
    assert (trouble, set(sought.values())) == ("", {Exists.NO})


def test_greylisting_is_asked_again_twice(scripted: Callable[..., ScriptedServer]) -> None:
    """Later, with the same address that nobody has; whoever is put off for good says so."""
    greylist = ["450 4.7.1 greylisted", None]
    server = scripted({
        "RCPT TO:<no-such-mailbox-": ["450 4.7.1 greylisted", "550 5.1.1 no"],
        "RCPT TO:<u0@": greylist, "RCPT TO:<u1@": ["450 4.7.1 greylisted", "450 4.7.1 greylisted", None],
        "RCPT TO:<u2@": "450 4.2.0 later",
    })  # fmt: skip
    found, trouble, waited = probe(server, *many(3), pauses=(0.001, 0.001))
    assert (trouble, waited) == ("", [3, 2])
    assert list(found.values()) == [Exists.YES, Exists.YES, Exists.PUT_OFF]
    assert len({line for line in server.commands if "no-such-mailbox-" in line}) == 1
    assert sum(line == "RCPT TO:<u2@a.example>" for line in server.commands) == 3


def test_a_limit_on_recipients_of_a_message_is_none_on_a_probe(scripted: Callable[..., ScriptedServer]) -> None:
    """Announced or not: the rest is asked about in further transactions of the connection."""

    def third(moment: Moment) -> str | None:
        said = [line for line in moment.connection.commands if line.startswith(("MAIL", "RCPT"))]
        number = len(said) - max(n for n, line in enumerate(said) if line.startswith("MAIL")) - 1
        return "452 4.5.3 Too many recipients" if number > 2 else None

    silent = scripted({**_NOBODY, "RCPT TO:<u": third})
    found, trouble, _ = probe(silent, *many(5))
    assert (trouble, set(found.values()), len(silent.connections)) == ("", {Exists.YES}, 1)
    open_ = scripted(_NOBODY, extensions=[*EXTENSIONS, "LIMITS RCPTMAX=1"])
    found, trouble, _ = probe(open_, *many(3))
    assert (trouble, set(found.values()), len(open_.transactions)) == ("", {Exists.YES}, 4)


def test_who_asks_and_how_fast(scripted: Callable[..., ScriptedServer]) -> None:
    """As a postmaster of ours, with SMTPUTF8 where it is needed alone, and at the pace that was asked for."""
    server = scripted(_NOBODY)
    begun = time.monotonic()
    found, _, _ = probe(server, "ann@a.example", "bob@a.example", interval=0.05)
    assert time.monotonic() - begun > 0.1
    assert "MAIL FROM:<postmaster@relay.example>" in server.commands
    probe(server, "ü@a.example")
    assert "MAIL FROM:<postmaster@relay.example> SMTPUTF8" in server.commands
    plain = scripted(_NOBODY, extensions=["PIPELINING"])
    found, _, _ = probe(plain, "ü@a.example", "ann@a.example")
    assert list(found.values()) == [Exists.UNTOLD, Exists.YES]
    lmtp = scripted({**_NOBODY, "RCPT TO:<bob@": "550 5.1.1 no"}, lmtp=True)
    found, _, _ = probe(lmtp, "ann@a.example", "bob@a.example")
    assert list(found.values()) == [Exists.YES, Exists.NO]
    assert "LHLO relay.example" in lmtp.commands
