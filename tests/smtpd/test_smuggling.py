"""SMTP smuggling, on input and output: one message in is one message out, however a server reads line ends.

Each odd end-of-data line stands between a message and another one that hides in it. What leaves is looked at as the
octets that left: to primary and backup, after a retry, by way of the spool, as an export, and in a real Postfix.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from contextlib import closing

import pytest

from support.dialogue import Dialogue
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]

ENDS = (b"\r\n", b"\n", b"\r", b"\r\r\n", b"\n\r", b"\r\n\r", b"\r\n\n")
DOTS = (b".", b"..", b"\0.", b".\0", b". ")
VARIANTS = [a + dot + b for a, dot, b in itertools.product(ENDS, DOTS, ENDS) if b"\r\n.\r\n" not in a + dot + b]
HIDDEN = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\nSubject: smuggled\r\n\r\ntwo\r\n"
# Whatever anybody has been seen to take for a line end, around whatever for a lone dot.
LENIENT = re.compile(rb"(?:\r\n|\n|\r)\.(?:\r\n|\n|\r)")
QUICK = {
    "retry.first": "1",
    "retry.longest": "1",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "redis.timeout_seconds": "1",
}


def mail(n: int, variant: bytes) -> bytes:
    """Return a message with another one in it."""
    return b"Subject: %d\r\n\r\none%b%b" % (n, variant, HIDDEN)


def tell(client: Dialogue, n: int, body: bytes, *, by: str, refused: bool) -> None:
    """Send a message by DATA, by BDAT, in BDAT chunks, or by DATA an octet a packet; the next command is ours."""
    client.say(f"MAIL FROM:<s{n}@example.com>", 250)
    client.say("RCPT TO:<b@example.com>", 250)
    if by == "bdat":
        client.raw(b"BDAT %d LAST\r\n" % len(body) + body)
    elif by == "chunks":
        pieces = [body[i : i + 3] for i in range(0, len(body), 3)]
        client.raw(b"".join(b"BDAT %d\r\n%b" % (len(piece), piece) for piece in pieces) + b"BDAT 0 LAST\r\n")
        for _ in pieces:
            client.expect(250)
    else:
        client.say("DATA", 354)
        end = b"" if body.endswith(b"\r\n") else b"\r\n"
        for piece in [body + end + b".\r\n"] if by == "data" else [bytes([o]) for o in body + end + b".\r\n"]:
            client.raw(piece)
    client.expect("550 5.6.11" if refused else 250)
    client.say("NOOP", 250)


def assert_harmless(server: ScriptedServer, count: int) -> None:
    """What a server has been sent is so many messages to the strictest reader and to the most lenient."""
    assert len(server.messages) == count
    assert not [t.sender for t in server.transactions if not re.fullmatch(r"s\d+@example\.com", t.sender)]
    ends = 0
    for connection in server.connections:
        octets = bytes(connection.received)
        assert not re.search(rb"(?<!\r)\n|\r(?!\n)", octets), "a bare CR or LF left us"
        assert len(LENIENT.findall(octets)) == octets.count(b"\r\n.\r\n")
        ends += octets.count(b"\r\n.\r\n")
    assert ends == count


@pytest.fixture
def chunking(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    """A primary with which clients may use BDAT."""
    return scripted(extensions=[*EXTENSIONS, "CHUNKING"])


@pytest.mark.parametrize("by", ["data", "bdat", "octets"])
def test_normalised(product: Make, chunking: ScriptedServer, backup: ScriptedServer, by: str) -> None:
    """With normalise every variant is text of its message, at the primary and in the copy, which are equal."""
    backup.replies["."] = ["451 4.3.0 later"] * 20 + [None]
    made = product(primary=chunking.address, backups=[backup.address], settings=QUICK)
    variants = VARIANTS[:: 7 if by == "octets" else 1]
    with made.dialogue() as client:
        client.hello()
        for n, variant in enumerate(variants):
            tell(client, n, mail(n, variant), by=by, refused=False)
    backup.wait_for(len(variants))
    assert_harmless(chunking, len(variants))
    copies = {t.sender: t.wire for t in backup.messages}
    assert copies == {t.sender: t.wire for t in chunking.messages}
    for connection in backup.connections:
        assert not re.search(rb"(?<!\r)\n|\r(?!\n)", connection.received), "a bare CR or LF left us"
        assert len(LENIENT.findall(connection.received)) == connection.received.count(b"\r\n.\r\n")
    assert not [t for t in backup.transactions if "evil" in t.sender]


@pytest.mark.parametrize("by", ["data", "bdat"])
def test_refused(product: Make, chunking: ScriptedServer, backup: ScriptedServer, by: str) -> None:
    """With refuse a bare CR or LF is answered 550 5.6.11, and nothing of such a message becomes mail anywhere."""
    settings = {**QUICK, "smtp.bare_newline": "refuse"}
    made = product(primary=chunking.address, backups=[backup.address], settings=settings)
    taken = []
    for start in range(0, len(VARIANTS), 10):  # a client that brings so many refused messages is disconnected
        with made.dialogue() as client:
            client.hello()
            for n, variant in enumerate(VARIANTS[start : start + 10], start):
                body = mail(n, variant)
                refused = re.search(rb"(?<!\r)\n|\r(?!\n)", body) is not None
                tell(client, n, body, by=by, refused=refused)
                taken += [n] * (not refused)
    backup.wait_for(len(taken))
    assert {t.sender for t in backup.messages} == {f"s{n}@example.com" for n in taken}
    assert_harmless(chunking, len(taken))
    assert_harmless(backup, len(taken))


def test_chunks_of_three_octets(product: Make, chunking: ScriptedServer, backup: ScriptedServer) -> None:
    """Cut into chunks anywhere, a variant is what it is in one piece."""
    made = product(primary=chunking.address, backups=[backup.address], settings=QUICK)
    with made.dialogue() as client:
        client.hello()
        for n, variant in enumerate(VARIANTS[::9]):
            tell(client, 2 * n, mail(n, variant), by="bdat", refused=False)
            tell(client, 2 * n + 1, mail(n, variant), by="chunks", refused=False)
    count = 2 * len(VARIANTS[::9])
    backup.wait_for(count)
    assert_harmless(chunking, count)
    assert_harmless(backup, count)
    bodies = {t.sender: t.content for t in chunking.messages}
    for n in range(len(VARIANTS[::9])):
        assert bodies[f"s{2 * n}@example.com"] == bodies[f"s{2 * n + 1}@example.com"]


def test_by_way_of_the_spool(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, redis_factory: Callable[..., RedisServer]
) -> None:
    """What waited in the spool leaves as what did not."""
    server = redis_factory()
    made = product(primary=primary.address, backups=[backup.address], settings=QUICK, redis_url=server.url)
    server.stop()
    variants = VARIANTS[::5]
    with made.dialogue() as client:
        client.hello()
        for n, variant in enumerate(variants):
            tell(client, n, mail(n, variant), by="data", refused=False)
    assert made.metric("smtpdup_spool_messages") or list(made.state_dir.rglob("*spool*"))
    server.start()
    backup.wait_for(len(variants), timeout=60)
    assert_harmless(primary, len(variants))
    assert_harmless(backup, len(variants))
    assert {t.sender: t.wire for t in backup.messages} == {t.sender: t.wire for t in primary.messages}


def test_export(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """`failed export` writes the one message that the primary took, its dots undone."""
    backup.replies["."] = "550 5.7.1 no"
    made = product(primary=primary.address, backups=[backup.address], settings=QUICK)
    variants = VARIANTS[::29]
    with made.dialogue() as client:
        client.hello()
        for n, variant in enumerate(variants):
            tell(client, n, mail(n, variant), by="data", refused=False)
    wait_until(lambda: made.summary()["failed"] == len(variants), message=lambda: made.log)
    bodies = {t.sender: t.body for t in primary.messages}
    for row in made.json("failed", "list"):
        done = made.run("failed", "export", row["id"])
        assert done.stdout == bodies[row["sender"]].decode().replace("\r\n", "\n")  # read as text


@pytest.fixture
def store(postfix: Callable[[PostfixInstance], PostfixInstance]) -> PostfixInstance:
    """A Postfix as lenient as it can be made: any line end will do for it."""
    return postfix(PostfixInstance.store(smtpd_forbid_bare_newline="no"))


@pytest.mark.postfix
def test_through_a_lenient_postfix(product: Make, store: PostfixInstance, backup: ScriptedServer) -> None:
    """A Postfix that takes LF.LF for the end of data behind us gets one message of each."""
    made = product(primary=f"127.0.0.1:{store.port}", backups=[backup.address], settings=QUICK)
    with made.dialogue() as client:
        client.hello()
        for n, variant in enumerate(VARIANTS):
            tell(client, n, mail(n, variant), by="data", refused=False)
    backup.wait_for(len(VARIANTS))
    assert_harmless(backup, len(VARIANTS))
    found = [re.findall(rb"(?m)^Subject: (\w+)", message) for message in store.wait_for(len(VARIANTS))]
    assert sorted(int(subjects[0]) for subjects in found) == list(range(len(VARIANTS)))
    assert all(b"smuggled" in subjects[1] for subjects in found), "the hidden one is text"


def test_a_pipelined_session_after_each(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """What comes in the same packet behind the true end is a command, what stands before it never."""
    made = product(primary=primary.address, backups=[backup.address], settings=QUICK)
    for n, variant in enumerate(VARIANTS[::6]):
        with closing(made.dialogue()) as client:
            client.hello()
            client.raw(
                b"MAIL FROM:<s%d@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n%b.\r\n"
                b"MAIL FROM:<s%d@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n.\r\nQUIT\r\n"
                % (2 * n, mail(n, variant), 2 * n + 1)
            )
            for code in (250, 250, 354, 250, 250, 250, 354, 250, 221):
                client.expect(code)
            assert client.is_closed()
    count = 2 * len(VARIANTS[::6])
    backup.wait_for(count)
    assert_harmless(primary, count)
    assert_harmless(backup, count)
