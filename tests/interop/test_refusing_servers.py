"""A real Postfix that refuses messages before their end, or at it: none counts as delivered, and no other suffers."""

from __future__ import annotations

import re

import pytest

from support.mail_site import MakeProduct, StartPostfix
from support.postfix_instance import PostfixInstance
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

pytestmark = pytest.mark.postfix

# What refuses the large message below, each at another stage.
SERVERS: dict[str, dict[str, str]] = {
    "size": {"message_size_limit": "20000", "smtpd_discard_ehlo_keywords": "size"},  # it says so at the end only
    "data": {"smtpd_data_restrictions": "check_sender_access inline:{{large@example.org = reject}}"},
    "end": {"smtpd_end_of_data_restrictions": "check_sender_access inline:{{large@example.org = reject}}"},
    "errors": {
        "smtpd_data_restrictions": "check_sender_access inline:{{large@example.org = reject}}",
        "smtpd_hard_error_limit": "1",
        "smtpd_soft_error_limit": "1",
    },
    "recipients": {
        "smtpd_recipient_restrictions": "check_recipient_access inline:{{no@example.com = reject}} permit_mynetworks",
        "message_size_limit": "20000",
    },
}
LARGE = b"Subject: large\r\n\r\n" + b"".join(b"%060d\r\n" % n for n in range(3000))
SMALL = b"Subject: small\r\n\r\nx\r\n"
TURNS = 4


def subjects(store: PostfixInstance) -> list[str]:
    found = (re.search(rb"^Subject: (\S+)", message, re.MULTILINE) for message in store.maildir_messages())
    return sorted(match[1].decode() for match in found if match)


def test_as_backups(product: MakeProduct, postfix: StartPostfix, primary: ScriptedServer) -> None:
    """What was refused is in the failed list with the server's own words, what was not arrives, mixed as it comes."""
    stores = {name: postfix(PostfixInstance.store(**options)) for name, options in SERVERS.items()}
    relay = product(
        primary=primary.address,
        backups=[f"{name}={store.address}" for name, store in stores.items()],
        settings={"retry.first": "1", "retry.longest": "2"},
    )
    for _ in range(TURNS):
        assert relay.send("large@example.org", "a@example.com", "no@example.com", data=LARGE).startswith("250")
        assert relay.send("small@example.org", "a@example.com", "b@example.com", data=SMALL).startswith("250")
    wait_until(lambda: all(not row["pending"] for row in relay.json("queue", "summary")), 60)
    for name, store in stores.items():
        failed = relay.json("failed", "list", "--destination", name)
        assert {f["sender"] for f in failed} == {"large@example.org"}, (name, failed)
        assert len(failed) == TURNS, name
        wait_until(lambda s=store: len(s.maildir_messages()) >= TURNS)
        assert set(subjects(store)) == {"small"}, name


@pytest.mark.parametrize("name", SERVERS)
def test_as_primary_and_beside_another(
    product: MakeProduct, postfix: StartPostfix, primary: ScriptedServer, backup: ScriptedServer, name: str
) -> None:
    """The client hears its refusal; where another primary of the message took it, it is in the failed list."""
    store = postfix(PostfixInstance.store(**SERVERS[name]))
    file = f"""
    [[server]]
    name = "strict"
    url = "{store.address}"
    [[backup]]
    name = "archive"
    url = "{backup.address}"
    [[route]]
    name = "strict"
    match = {{ recipients = "@example.com" }}
    primary = "strict"
    backups = ["archive"]
    split = "fork"
    """
    relay = product(
        primary=f"lax={primary.address}",
        files={"settings.toml": file},
        settings={"retry.first": "1", "retry.longest": "2"},
    )
    with relay.dialogue() as client:
        client.hello()
        for beside in (False, True, False):
            client.send(
                "MAIL FROM:<large@example.org>",
                "RCPT TO:<a@example.com>",
                "RCPT TO:<no@example.com>",
                *(["RCPT TO:<x@lax.example>"] if beside else []),
                "DATA",
            )
            said = [client.reply() for _ in range(5 if beside else 4)]
            if said[-1].startswith("354"):
                client.raw(LARGE + b".\r\n")
                said.append(client.reply())
            assert said[-1].startswith("250" if beside else ("55", "451")), said
            client.say("MAIL FROM:<small@example.org>", 250)
            client.say("RCPT TO:<a@example.com>", 250)
            client.say("DATA", 354)
            client.raw(SMALL + b".\r\n")
            assert client.reply().startswith("250")
    backup.wait_for(4)
    wait_until(lambda: all(not row["pending"] for row in relay.json("queue", "summary")), 60)
    assert len(relay.json("failed", "list", "--destination", "strict")) == 1
    wait_until(lambda: len(subjects(store)) >= 3)
    assert subjects(store) == ["small"] * 3
    assert [m.recipients for m in primary.messages] == [["x@lax.example"]]
    assert sorted(m.header("Subject") or "" for m in backup.messages) == ["large"] + ["small"] * 3
