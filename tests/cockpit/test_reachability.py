"""A host's looks at the servers: whether it is let in, with no message sent, and what the certificate is worth."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from relay.cockpit.reachability import Looks, keep_looking
from relay.ledger import hosts
from relay.ledger.hosts import Reach
from support.certificates import Certificate
from support.ledger_contents import settings
from support.reactions import Silence
from support.scripted_server import ScriptedServer
from support.waiting import wait_until


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as scripted:
        yield scripted


def looks(server: ScriptedServer, *, delivers: bool = True, **options: str) -> Looks:
    given = {
        "relay_destination_primary": server.address,
        "smtp_domain": "relay.example",
        "relay_timeout_seconds": "1",
        "relay_greeting_timeout_seconds": "1",
        "relay_command_timeout_seconds": "1",
        **options,
    }
    return Looks(settings(**given), "here", delivers=delivers)


async def look(found: Looks) -> Reach:
    (reach,) = await found.all()
    return reach


async def test_a_relay_host_says_ehlo_and_quit(server: ScriptedServer) -> None:
    """No transaction where nothing would ever be delivered from."""
    reach = await look(looks(server, delivers=False))
    assert (reach.ok, reach.destination, reach.place, reach.gave_mail) == (True, server.address, "here", False)
    assert server.connections[0].verbs == ["EHLO", "QUIT"]


async def test_a_host_with_workers_says_mail_too_and_sends_nothing(server: ScriptedServer) -> None:
    """The server may know the relay's address only."""
    reach = await look(looks(server))
    assert (reach.ok, reach.gave_mail) == (True, True)
    assert server.connections[0].commands[1:] == ["MAIL FROM:<postmaster@relay.example>", "RSET", "QUIT"]
    server.replies["MAIL"] = "550 5.7.1 not from you"
    reach = await look(looks(server))
    assert (reach.ok, reach.text) == (False, "MAIL is refused: 550 5.7.1 not from you")


@pytest.mark.parametrize(
    ("replies", "text"),
    [
        ({"CONNECT": "554 5.7.1 go away"}, "go away"),
        ({"CONNECT": Silence()}, "no answer in time"),
        ({"MAIL": Silence()}, "MAIL"),
        ({"EHLO": "550 no\x1b[2J"}, "EHLO"),
    ],
)
async def test_trouble_with_the_server_is_what_was_found(replies: dict[str, Any], text: str) -> None:
    """In a line that can be shown; never an exception."""
    with ScriptedServer(replies) as strange:
        reach = await look(looks(strange))
        assert (reach.ok, text in reach.text, reach.text.isprintable()) == (False, True, True)


async def test_a_server_that_is_not_there(server: ScriptedServer) -> None:
    """Refused connections say where."""
    server.down()
    reach = await look(looks(server))
    assert (reach.ok, reach.text.startswith(f"cannot connect to {server.address}: ")) == (False, True)


async def test_what_the_certificate_is_worth(certificate: Certificate) -> None:
    """Whether tls = verify would take it, why not, and when it ends; asked once an hour, not at every look."""
    with ScriptedServer(tls=certificate.server_context()) as server:
        found = looks(server)
        reach = await look(found)
        assert (reach.ok, reach.verified) == (True, False)
        assert "certificate not accepted" in reach.why_unverified
        count = len(server.connections)
        await look(found)
        assert len(server.connections) == count + 1
        trusted = f"smtp://localhost:{server.port}?ca_file={certificate.certificate}"
        trusting = looks(server, relay_destination_primary=trusted)
        reach = await look(trusting)
        assert reach.verified is True
        assert reach.certificate_ends > time.time()


def test_looks_are_told_and_a_stop_does_not_wait_for_a_slow_server(redis_url: str) -> None:
    """Again and again until the stop, which interrupts a look that may take minutes."""
    connection, stop = redis.Redis.from_url(redis_url), threading.Event()
    with ScriptedServer() as server:
        options = {"relay_greeting_timeout_seconds": "300"}
        thread = threading.Thread(target=keep_looking, args=(connection, looks(server, **options), 0.05, stop))
        thread.start()
        try:
            wait_until(lambda: [r.ok for r in hosts.reaches(connection, server.address)] == [True])
            server.replies["CONNECT"] = Silence()
            wait_until(lambda: any(not c.sent and not c.closed for c in server.connections))
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()
