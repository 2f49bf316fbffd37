"""XFORWARD and XCLIENT: accepted from trusted clients, sent to servers that offer them, with nothing added."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client.xforward import _commands
from relay.mail.addresses import network_prefix
from relay.mail.envelope import Envelope
from relay.mail.origin import of_client, of_envelope
from relay.smtpd.xclient import XCLIENT, XFORWARD, BadAttribute, read_attributes

ALL = {"XFORWARD": " ".join(XFORWARD), "XCLIENT": " ".join(XCLIENT)}
VALUES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=255)


@given(VALUES, VALUES)
def test_there_and_back(helo: str, ident: str) -> None:
    """What we say is what we would read: xtext both ways, in lines of 512 octets at most."""
    identity = (("ADDR", "2001:db8::7"), ("PORT", "25"), ("HELO", helo), ("IDENT", ident))
    lines = _commands("XFORWARD", identity, ALL)
    assert all(len(line) <= 510 or line.count(b"=") == 1 for line in lines)
    assert not any(octet < 33 or octet > 126 for line in lines for octet in line.replace(b" ", b""))
    found: dict[str, str] = {}
    for line in lines:
        verb, _, rest = line.decode("ascii").partition(" ")
        assert verb == "XFORWARD"
        found |= read_attributes(rest, XFORWARD)
    unavailable = ("[UNAVAILABLE]", "[TEMPUNAVAIL]")
    assert found == {name: "" if value.upper() in unavailable else value for name, value in identity}


@given(st.text(max_size=300))
def test_whatever_is_said(text: str) -> None:
    """Anything is read or is a BadAttribute; what is read holds no control character."""
    for known in (XFORWARD, XCLIENT):
        try:
            found = read_attributes(text, known)
        except BadAttribute:
            continue
        assert all(value.isprintable() for value in found.values())


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.8.9.1", "::1"])
def test_a_client_on_our_machine_is_nobody_to_tell_of(address: str) -> None:
    """To another machine its address would be that machine's own."""
    assert of_client(address, 1234, "x", extended=True) == ()


def test_of_an_envelope() -> None:
    """A copy is introduced by what was said for it, else by where it came from."""

    def envelope(**fields: object) -> Envelope:
        return Envelope("0" * 16, "a@example.com", (), 0.0, 1, **fields)

    told = (("ADDR", "192.0.2.1"),)
    assert of_envelope(envelope(client_address="192.0.2.9", identity=told)) == told
    assert dict(of_envelope(envelope(client_address="192.0.2.9", client_helo="h"))) == {
        "ADDR": "192.0.2.9",
        "PROTO": "ESMTP",
        "HELO": "h",
        "SOURCE": "REMOTE",
    }


def test_households() -> None:
    """An IPv6 client has a /64 to choose addresses from; it is one client all the same."""
    assert network_prefix("2001:db8::1") == network_prefix("2001:db8::ffff:1") != network_prefix("2001:db8:0:1::1")
    assert network_prefix("192.0.2.1") != network_prefix("192.0.2.2")
