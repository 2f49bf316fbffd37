"""Whether mailboxes exist at a server: what each of its replies is taken to mean, and how modest the question is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from relay.cockpit import mailbox_probe
from relay.cockpit.mailbox_probe import Exists, Probed
from relay.config.loader import Settings
from relay.mail.destination import Destination
from support.ledger_contents import settings
from support.reactions import Close, Silence
from support.scripted_server import ScriptedServer

_NOBODY = {"RCPT TO:<no-such-mailbox-": "550 5.1.1 no such user"}


def ask(server: ScriptedServer, *addresses: str, known: Settings | None = None) -> dict[str, Probed]:
    found = mailbox_probe.probe(known or settings(), server.destination("new"), addresses)
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
        ("450 4.2.0 greylisted", Exists.UNKNOWN),
        ("451 4.3.0 try again", Exists.UNKNOWN),
        ("421 4.7.0 go away", Exists.UNKNOWN),
        (Close(), Exists.UNKNOWN),
    ],
)
def test_what_a_reply_means(scripted: Callable[..., ScriptedServer], reply: object, result: Exists) -> None:
    """Yes, no, refused for another reason; whatever is temporary says nothing."""
    found = ask(scripted({**_NOBODY, "RCPT TO:<ann@": reply}), "ann@a.example")["ann@a.example"]
    assert found.result is result
    assert found.keeps == (result in {Exists.NO, Exists.REFUSED})


def test_a_server_that_accepts_anything(scripted: Callable[..., ScriptedServer]) -> None:
    """Its yes says nothing, its no does; each domain is judged by itself."""
    server = scripted({"RCPT TO:<bad@": "550 5.1.1 no", "RCPT TO:<no-such-mailbox-": "250 2.1.5 ok"})
    found = ask(server, "ann@a.example", "bad@a.example", "bob@b.example")
    assert [one.result for one in found.values()] == [Exists.UNKNOWN, Exists.NO, Exists.UNKNOWN]
    assert "accepts anything" in found["ann@a.example"].text


def test_a_server_that_cannot_say(scripted: Callable[..., ScriptedServer]) -> None:
    """No null sender, silence, nobody there, a domain: unknown, with the reason; later addresses are not asked."""
    refusing = scripted({"MAIL": "550 5.7.1 no null sender here"})
    assert "refuses MAIL FROM:<>" in ask(refusing, "ann@a.example")["ann@a.example"].text
    known = settings(relay_command_timeout_seconds="0.3")
    silent = scripted({**_NOBODY, "RCPT TO:<ann@": Silence()})
    found = ask(silent, "ann@a.example", "bob@a.example", known=known)
    assert {one.result for one in found.values()} == {Exists.UNKNOWN}
    gone = Destination(name="new", host="127.0.0.1", port=1)
    (one,) = mailbox_probe.probe(settings(), gone, ["ann@a.example"])
    assert (one.result, "cannot be used" in one.text) == (Exists.UNKNOWN, True)
    assert ask(scripted(_NOBODY), "@a.example")["@a.example"].result is Exists.UNKNOWN


def test_it_is_modest(scripted: Callable[..., ScriptedServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty addresses a connection, one connection at a time, a control a domain, no more than so many."""
    monkeypatch.setattr(mailbox_probe, "MOST", 45)
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
