"""A message whose first line no header begins like: our Received line must not swallow it."""

from __future__ import annotations

import re

import pytest

from support.dialogue import Dialogue
from support.mail_site import MakeProduct
from support.scripted_server import EXTENSIONS, ScriptedServer

FIRST = (b" ", b"\t", b" \r\n", b" id x;\r\n\tby", b"\t.", b"  Subject: not one\r\n")
WAYS = ("DATA", "BDAT", "octet by octet")
TRACE_LINES = 3


def test_a_first_line_that_is_indented(product: MakeProduct, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """It would be a continuation of the Received line: an empty line keeps them apart, as Postfix does it."""
    primary.extensions[:] = (*EXTENSIONS, "CHUNKING")
    relay = product(primary=primary.address, backups=[backup.address])
    expected = {}
    with relay.dialogue() as client:
        client.hello()
        for number, (first, way) in enumerate((first, way) for first in FIRST for way in WAYS):
            content = first + b"text\r\n.\r\nmore\r\n"
            _send(client, f"{number}@example.net", content, way)
            expected[f"{number}@example.net"] = b"\r\n" + content
            # And in the next message nothing is left of it.
            content = b"Subject: x\r\n\r\n text\r\n"
            _send(client, f"{number}-next@example.net", content, way)
            expected[f"{number}-next@example.net"] = content
        client.quit()
    for server in (primary, backup):
        server.wait_for(len(expected))
        below = {m.sender: m.body.split(b"\r\n", TRACE_LINES)[TRACE_LINES] for m in server.messages}
        assert below == expected


def _send(client: Dialogue, sender: str, content: bytes, way: str) -> None:
    client.say(f"MAIL FROM:<{sender}>", 250)
    client.say("RCPT TO:<b@example.com>", 250)
    if way == "DATA":
        client.body(content)
        return
    size = len(content) if way == "BDAT" else 1
    for start in range(0, len(content), size):
        client.raw(b"BDAT %d\r\n" % size + content[start : start + size])
        client.expect(250)
    client.say("BDAT 0 LAST", 250)


# As they are on the wire, dot-stuffed; a server undoes that, and some drop NULs.
STUFFED = (b". from forged ([192.0.2.1])", b".\tby forged", b"..", b".. x", b".x: y", b"\0 from forged",
           b".\0 from forged", b"\0\0\t", b"\0: x", b"\n from forged", b"\r from forged")  # fmt: skip
JOINED = (b". ", b".\t", b"\0 ", b".\0 ", b"\0\0\t")


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_a_first_line_that_is_indented_behind_a_dot(
    product: MakeProduct, primary: ScriptedServer, backup: ScriptedServer, cut: int
) -> None:
    """The dot of dot-stuffing goes at the next server, and then the line would go on with ours."""
    relay = product(primary=primary.address, backups=[backup.address])
    expected = {}
    with relay.dialogue() as client:
        client.hello()
        for number, first in enumerate(STUFFED):
            client.say(f"MAIL FROM:<{number}@example.net>", 250)
            client.say("RCPT TO:<b@example.com>", 250)
            client.say("DATA", 354)
            wire = first + b"\r\nSubject: x\r\n\r\n text\r\n"
            for start in range(0, len(wire), cut):
                client.raw(wire[start : start + cut])
            client.raw(b".\r\n")
            client.expect(250)
            apart = b"\r\n" if first.startswith(JOINED) else b""
            expected[f"{number}@example.net"] = apart + re.sub(rb"(?<!\r)\n|\r(?!\n)", b"\r\n", wire)
    for server in (primary, backup):
        server.wait_for(len(expected))
        assert {m.sender: m.wire[len(m.trace) :] for m in server.messages} == expected
