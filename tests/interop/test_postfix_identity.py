"""Real Postfix on both sides of whose mail it is, and in front of TLS and passwords."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support.certificates import Certificate
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

pytestmark = pytest.mark.postfix

# From a client that is not in mynetworks.
FOR_ITS_DOMAINS = {"smtpd_relay_restrictions": "permit_mynetworks, reject_unauth_destination"}

MakeProduct = Callable[..., Product]
StartPostfix = Callable[[PostfixInstance], PostfixInstance]


def logged(store: PostfixInstance, pattern: str) -> str:
    """Return what the pattern finds in its log, as soon as it is there."""
    found = wait_until(lambda: re.search(pattern, store.log), message=lambda: store.log)
    return found[0] if found else ""


@pytest.mark.parametrize("granted", ["XFORWARD", "XCLIENT"])
def test_both_legs_tell_postfix_who_the_client_is(product: MakeProduct, postfix: StartPostfix, granted: str) -> None:
    """By XFORWARD its log names the client of the MTA in front; by XCLIENT it is that client for everything."""
    hosts = {"smtpd_authorized_xforward_hosts": "", "smtpd_authorized_xclient_hosts": "", **FOR_ITS_DOMAINS}
    hosts[f"smtpd_authorized_{granted.lower()}_hosts"] = "127.0.0.0/8"
    old, new = (postfix(PostfixInstance.store(**hosts)) for _ in range(2))
    relay = product(primary=f"127.0.0.1:{old.port}", backups=[f"127.0.0.1:{new.port}"])
    with relay.dialogue() as client:
        client.hello()
        for n in range(3):
            client.say(f"XFORWARD NAME=mail.example.net ADDR=192.0.2.{n} PORT=50000 PROTO=ESMTP HELO=h{n}.example", 250)
            client.mail("a@example.com", "b@example.com")
        client.mail("a@example.com", "b@example.com")
        client.quit()
    for store in (old, new):
        store.wait_for(4)
        for n in range(3):
            logged(store, rf"client=mail.example.net\[192\.0\.2\.{n}\]")
        logged(store, r": client=unknown\[127\.0\.0\.1\]\n")
    relay.stop()


def test_a_client_that_postfix_blocks(product: MakeProduct, postfix: StartPostfix) -> None:
    """A primary that turns the real client away is heard, and no copy is made."""
    old = postfix(
        PostfixInstance.store(
            smtpd_client_restrictions="check_client_access inline:{ {192.0.2.66 = REJECT blocked here} }",
            **FOR_ITS_DOMAINS,
        )
    )
    relay = product(primary=f"127.0.0.1:{old.port}", backups=[])
    with relay.dialogue() as client:
        client.hello()
        client.say("XFORWARD ADDR=192.0.2.66", 250)
        client.say("MAIL FROM:<a@example.com>", 250)
        assert "blocked here" in client.say("RCPT TO:<b@example.com>", "554 5.7.1")
        client.say("RSET", 250)
        client.say("XFORWARD ADDR=192.0.2.7", 250)
        client.mail("a@example.com", "b@example.com")
    assert len(old.wait_for(1)) == 1


def test_postfix_in_front_under_tls(
    product: MakeProduct, postfix: StartPostfix, primary: ScriptedServer, certificate: Certificate
) -> None:
    """Postfix as a client that insists on TLS, and says whose mail it is."""
    settings = {
        "smtp.tls": "encrypt",
        "smtp.tls_certificate": str(certificate.certificate),
        "smtp.tls_key": str(certificate.key),
    }
    primary.extensions.append("XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE")
    relay = product(primary=primary.address, backups=[], settings=settings)
    front = postfix(
        PostfixInstance.front(
            relay.smtp_port, smtp_tls_security_level="encrypt", smtpd_authorized_xforward_hosts="127.0.0.0/8"
        )
    )
    front.submit("a@example.com", ["b@example.com"], b"Subject: x\r\n\r\ntext\r\n")
    (message,) = primary.wait_for(1)
    assert b" with ESMTPS id " in message.trace
    assert message.xforward["ADDR"] == "127.0.0.1"
    assert message.xforward["IDENT"]
