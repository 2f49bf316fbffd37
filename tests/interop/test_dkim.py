"""DKIM signatures hold at the primary and at every backup: nothing that a signature is about is changed on the way."""

from __future__ import annotations

import base64
import itertools
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dkim
import pytest

from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer

HEADER = (
    b"From: =?utf-8?q?J=C3=BCrgen?= <juergen@example.net>\r\n"
    b"To: b@example.com\r\n"
    b"Subject:   odd \t  white   space\r\n"
    b"\t and a folded \r\n"
    b"   line  \r\n"
    b"Date: Sun, 22 Nov 2026 10:00:00 +0000\r\n"
    b"Message-ID: <signed@example.net>\r\n"
    b"X-Long: " + b"y" * 2000 + b"\r\n"
    b"X-Empty:\r\n"
    b"MIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n"
    b"\r\n"
)
BODIES = {
    "plain": b"text\r\n",
    "empty": b"",
    "trailing blank lines": b"text\r\n\r\n\r\n\r\n",
    "blank lines only": b"\r\n\r\n\r\n",
    "leading blank lines": b"\r\n\r\ntext\r\n",
    "spaces": b"text  \t \r\n  \t\r\n a  b \t c\r\n \r\n",
    "eight-bit": "Grüße, 你好, \U0001f4e8\r\n".encode() * 20 + b"\xff\xfe\x80\r\n",
    "dots": b".\r\n..\r\n.x\r\n...\r\n. \r\n\r\n.\r\n",
    "long lines": b"x" * 998 + b"\r\n" + b"y" * 5000 + b"\r\n." + b"." * 3000 + b"\r\n",
    "mailbox lines": b"From here\r\n>From there\r\n",
    "large": b"0123456789abcdef\r\n.\r\n" * 40_000,
}
CANONS = {
    "simple/simple": (b"simple", b"simple"),
    "relaxed/relaxed": (b"relaxed", b"relaxed"),
    "simple/relaxed": (b"simple", b"relaxed"),
    "relaxed/simple": (b"relaxed", b"simple"),
}
# With what is not there, and once more than it is there: that nothing may be added is signed, too.
OVERSIGNED = [b"from", b"from", b"to", b"subject", b"subject", b"date", b"message-id", b"x-long", b"x-empty", b"cc"]


NUMBERS = itertools.count()


class Key(NamedTuple):
    """A private key as PEM, and what the DNS says of it."""

    private: bytes
    record: bytes

    def sign(self, message: bytes, canon: tuple[bytes, bytes], *, length: bool = False) -> bytes:
        """Return a message with a signature on top."""
        options = {"canonicalize": canon, "include_headers": OVERSIGNED, "length": length}
        return dkim.sign(message, b"test", b"example.net", self.private, **options) + message

    def verifies(self, message: bytes) -> bool:
        """Say whether the signature on a message holds."""
        return bool(dkim.verify(message, dnsfunc=lambda *_, **__: self.record, minkey=1024))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    """A key of the test's own."""
    private = tmp_path_factory.mktemp("dkim") / "key.pem"
    rsa = ("openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", str(private))
    subprocess.run(rsa, check=True, capture_output=True)
    public = ("openssl", "pkey", "-in", str(private), "-pubout", "-outform", "DER")
    done = subprocess.run(public, check=True, capture_output=True)
    return Key(private.read_bytes(), b"v=DKIM1; k=rsa; p=" + base64.b64encode(done.stdout))


class Site(NamedTuple):
    relay: Product
    servers: tuple[ScriptedServer, ...]

    def pass_on(self, *messages: bytes, way: str = "DATA") -> list[bytes]:
        """Send messages; return them as they are at the primary and at each of the two backups."""
        senders = [f"a{next(NUMBERS)}@example.net" for _ in messages]
        with self.relay.dialogue() as client:
            client.hello()
            for sender, message in zip(senders, messages, strict=True):
                client.say(f"MAIL FROM:<{sender}> BODY=8BITMIME", 250)
                client.say("RCPT TO:<b@example.com>", 250)
                if way == "DATA":
                    client.body(message)
                else:
                    client.raw(b"BDAT %d LAST\r\n" % len(message) + message)
                    client.expect(250)
            client.quit()
        arrived = []
        for server in self.servers:
            server.wait_until(lambda server=server: set(senders) <= {got.sender for got in server.messages})
            arrived += [got.body for got in server.messages if got.sender in senders]
        return arrived


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A relay with a primary and two backups."""
    servers = tuple(ScriptedServer(extensions=(*EXTENSIONS, "CHUNKING")).start() for _ in range(3))
    primary, *backups = servers
    folder: Path = tmp_path_factory.mktemp("dkim-site")
    try:
        with Product(folder, primary=primary.address, backups=[backup.address for backup in backups]) as relay:
            yield Site(relay, servers)
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("canon", CANONS.values(), ids=CANONS)
@pytest.mark.parametrize("way", ["DATA", "BDAT"])
def test_signatures_hold(site: Site, key: Key, canon: tuple[bytes, bytes], way: str) -> None:
    """Every kind of body under every canonicalisation, by DATA and BDAT: the signature holds at all three servers."""
    messages = [key.sign(HEADER + body, canon) for body in BODIES.values()]
    assert all(map(key.verifies, messages))
    arrived = site.pass_on(*messages, way=way)
    assert len(arrived) == 3 * len(messages)
    for message in arrived:
        assert message.startswith(b"Received: ")
        assert key.verifies(message), message[:2000]


def test_signatures_over_a_part(site: Site, key: Key) -> None:
    """With l= a list may add its footer; the signature holds behind us as it did in front."""
    messages = [
        key.sign(HEADER + body, CANONS["relaxed/relaxed"], length=True) + b"-- \r\nfooter\r\n"
        for body in BODIES.values()
        if body.endswith(b"\r\n")
    ]
    assert all(map(key.verifies, messages))
    assert all(map(key.verifies, site.pass_on(*messages)))


def test_several_signatures(site: Site, key: Key) -> None:
    """Signed on the way again and again, trace lines between: the first one still holds, in its place."""
    message = key.sign(HEADER + BODIES["dots"], CANONS["simple/simple"])
    trace = b"Received: from x by y;\r\n\tSun, 22 Nov 2026 10:00:00 +0000\r\n"
    message = key.sign(trace + message, CANONS["relaxed/simple"])
    for got in site.pass_on(message):
        assert got.endswith(message)
        assert dkim.DKIM(got).verify(idx=0, dnsfunc=lambda *_, **__: key.record)
        assert dkim.DKIM(got).verify(idx=1, dnsfunc=lambda *_, **__: key.record)


def test_what_was_broken_stays_broken(site: Site, key: Key) -> None:
    """A signature that does not hold in front of us does not hold behind us: this test can fail."""
    good = key.sign(HEADER + b"text\r\n", CANONS["simple/simple"])
    for bad in (good.replace(b"text", b"Text"), good.replace(b"odd", b"Odd"), good + b".\r\n"):
        assert not any(map(key.verifies, site.pass_on(bad)))
