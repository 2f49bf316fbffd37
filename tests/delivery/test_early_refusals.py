"""A server that refuses a copy before its dot has not taken it, whatever it said to its recipients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis

from support.ledger_contents import Contents
from support.reactions import Close, HalfClose, Reset
from support.running_courier import at_work
from support.scripted_server import ScriptedServer
from support.waiting import until

LARGE = b"Subject: large\r\n\r\n" + b"".join(b"%060d\r\n" % n for n in range(30_000))
ENDS = {"close": Close(), "half-close": HalfClose(), "reset": Reset()}


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


def settled(contents: Contents, ids: list[str]) -> list[tuple[str, int]]:
    """Return whom (message, recipient) the ledger takes for served, of messages to two recipients."""
    waiting, failed = contents.pending_ids(), contents.failed_ids()
    found = []
    for message_id in ids:
        left: set[int] = set()
        for listed, is_failure in ((waiting, False), (failed, True)):
            if message_id in listed:
                owed = contents.state(message_id, failure=is_failure).owed
                left |= {0, 1} if owed is None else set(owed)
        found += [(message_id, i) for i in (0, 1) if i not in left]
    return found


@pytest.mark.parametrize("code", ["552 5.3.4 too large", "554 5.7.1 no", "452 4.3.1 full", "421 4.3.2 down"])
@pytest.mark.parametrize("end", ENDS)
async def test_within_a_large_body(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer, code: str, end: str
) -> None:
    """Its reply may come in the same moment as the end of the connection, while the writer waits for room."""
    backup.in_data = (200_000, (code, ENDS[end]))
    ids = [contents.pending("a@test", "b@test", body=LARGE) for _ in range(12)]
    async with at_work(redis_url, backup, connections=4) as work:
        for n, message_id in enumerate(ids):
            work.add([message_id], f"job {n}")
        await until(lambda: len(backup.connections) >= 4, 20)
    assert not backup.messages
    assert settled(contents, ids) == []


@pytest.mark.parametrize("extensions", [["PIPELINING", "8BITMIME"], ["8BITMIME"]], ids=["pipelining", "plain"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("DATA", b"354 go\r\n554 5.7.1 no\r\n"),
        ("DATA", b"354 go\r\n250 ok\r\n"),
        ("DATA", b"354 go\r\n221 2.0.0 bye\r\n"),
        ("DATA", b"354 go\r\n250-2.0.0 half\r\n"),
        ("DATA", b"354 go\r\n250 2.0.0 ha"),
        ("RCPT TO:<b@test>", b"250 ok\r\n554 5.7.1 no\r\n"),
        ("RCPT TO:<b@test>", b"250 ok\r\n250 ok\r\n"),
        ("MAIL", b"250 ok\r\n554 5.7.1 no\r\n"),
    ],
)
async def test_before_the_body(
    contents: Contents,
    redis_url: str,
    redis_client: redis.Redis,
    backup: ScriptedServer,
    command: str,
    said: bytes,
    end: str,
    extensions: list[str],
) -> None:
    """A reply that nobody has asked for, at once with the one before it: nobody's copy is settled."""
    backup.extensions[:] = extensions
    backup.replies[command] = (said, ENDS[end])
    ids = [contents.pending("a@test", "b@test") for _ in range(3)]
    async with at_work(redis_url, backup) as work:
        for n, message_id in enumerate(ids):
            work.add([message_id], f"job {n}")
        await until(lambda: len(backup.connections) >= 3, 20)
    assert not backup.messages
    assert settled(contents, ids) == []


@pytest.mark.parametrize("said", ["221 2.0.0 bye", "220 hello", "354 go ahead"])
@pytest.mark.parametrize("lmtp", [False, True], ids=["smtp", "lmtp"])
async def test_no_verdict_at_the_dot(
    redis_url: str, redis_client: redis.Redis, scripted: Callable[..., ScriptedServer], lmtp: bool, said: str
) -> None:
    """Goodbye, or hello, is no yes to the message; LMTP: what the others were told before counts."""
    backup = scripted(lmtp=lmtp)
    contents = Contents(redis_client, "new")
    contents.register(backup.destination("new"))
    backup.replies[".<b@test>" if lmtp else "."] = (said, Close())
    message_id = contents.pending("a@test", "b@test", "c@test")
    async with at_work(redis_url, backup) as work:
        work.add([message_id])
        await until(lambda: contents.pending_ids() and contents.state(message_id).attempts == 1, 20)
    assert contents.state(message_id).owed == ((1, 2) if lmtp else (0, 1, 2))
