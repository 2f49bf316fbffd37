"""What servers say to EHLO reaches the ledger when it changes, off the mail path, and small."""

from __future__ import annotations

import asyncio

import pytest
import redis
import redis.asyncio

from relay.client.pool import Pool
from relay.ledger import greetings
from relay.ledger.greetings import Greeting, Greetings
from relay.mail.timeouts import Timeouts
from support.certificates import Certificate
from support.scripted_server import ScriptedServer
from support.waiting import until


async def talk(server: ScriptedServer, told: Greetings) -> None:
    """Open a connection as relay and workers do, and close it."""
    pool = Pool(server.destination("new"), local_hostname="a", timeouts=Timeouts.of(20.0), limit=1, on_open=told.note)
    pool.give_back(await pool.lease())
    await pool.close()


async def test_it_is_told_once_and_again_when_it_has_changed(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write for each change, not for each connection."""
    plain, connection = redis.Redis.from_url(redis_url), redis.asyncio.Redis.from_url(redis_url)
    told = Greetings(connection)
    with ScriptedServer(extensions=["SIZE 1000", "X-ODD a b"]) as server:
        await talk(server, told)
        await until(lambda: bool(greetings.read(plain, ["new"])))
        found = greetings.read(plain, ["new"])["new"]
        assert dict(found.extensions) == {"SIZE": "1000", "X-ODD": "a b"}
        assert not found.offers_tls
        plain.delete("smtpdup:ehlo:new")
        await talk(server, told)
        assert greetings.read(plain, ["new"]) == {}
        server.extensions[:] = ["SIZE 2000"]
        await talk(server, told)  # nodes behind a name may differ: not more often than once in ten seconds
        assert greetings.read(plain, ["new"]) == {}
        monkeypatch.setattr(greetings, "_PAUSE_SECONDS", 0.0)
        await talk(server, told)
        await until(lambda: greetings.read(plain, ["new"]).get("new", Greeting()).extensions == {"SIZE": "2000"})
    await connection.aclose()


async def test_after_starttls_it_offers_tls(redis_url: str, certificate: Certificate) -> None:
    """The second EHLO has no STARTTLS any more (RFC 3207 4.2)."""
    plain, connection = redis.Redis.from_url(redis_url), redis.asyncio.Redis.from_url(redis_url)
    with ScriptedServer(tls=certificate.server_context()) as server:
        pool = Pool(
            server.destination("new", tls="encrypt"),
            local_hostname="a",
            timeouts=Timeouts.of(20.0),
            limit=1,
            on_open=Greetings(connection).note,
        )
        pool.give_back(await pool.lease())
        await pool.close()
        await until(lambda: bool(greetings.read(plain, ["new"])))
        assert greetings.read(plain, ["new"])["new"].offers_tls
    await connection.aclose()


async def test_a_redis_that_is_away_holds_up_nobody() -> None:
    """It is told with a later connection; the connection itself is lent at once."""
    connection = redis.asyncio.Redis(unix_socket_path="/nowhere.sock")
    told = Greetings(connection)
    with ScriptedServer() as server:
        await talk(server, told)
        while told._telling:
            await asyncio.wait(told._telling)
        assert told._told == {}
        await talk(server, told)
    await connection.aclose()
