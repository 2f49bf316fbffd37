"""A kept connection is used for so long, and for so many messages, on both legs; the next resolves the name anew."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import redis

from relay.client.pool import Pool
from support.dialogue import AsyncDialogue
from support.in_process_relay import serve, settings_of
from support.ledger_contents import Contents, settings
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.delivery.courier import Courier

HOST = "moves.example.com"
RESOLVE = socket.getaddrinfo
AGE = 300.0


class Leg:
    """One leg to the server of that name: how it sends a message, and its pool."""

    def __init__(self, send: Callable[[], Awaitable[object]], pool: Pool) -> None:
        self.send = send
        self._pool = pool

    def grow_older(self, seconds: float) -> None:
        """Have its kept connections be opened so much longer ago."""
        assert self._pool.idle
        for connection in self._pool._idle:
            connection.created -= seconds


Open = Callable[..., Any]


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ScriptedServer, ScriptedServer, Callable[[], None]]]:
    """Two servers, of which one name is the first's until it is told to move to the second."""
    first = ScriptedServer().start()
    second = ScriptedServer(port=first.port)
    second.host = "127.0.0.2"
    second.start()
    now = [first]

    def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host in (HOST, f"{HOST}.") and not options.get("flags") and not any(args[3:]):
            return RESOLVE(now[0].host, port, type=socket.SOCK_STREAM)[:1]
        return RESOLVE(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    yield first, second, lambda: now.__setitem__(0, second)
    first.stop()
    second.stop()


@pytest.fixture(params=["primary", "backup"])
def leg(request: pytest.FixtureRequest, redis_client: redis.Redis, redis_url: str) -> Open:
    """Open either leg to a server; options are the destination's."""

    @asynccontextmanager
    async def primary(
        address: str, messages_per_connection: int = 0, connection_age: float = AGE
    ) -> AsyncIterator[Leg]:
        given = {
            "relay.messages_per_connection": str(messages_per_connection),
            "relay.connection_age": str(connection_age),
        }
        async with (
            serve(settings_of(address, given), redis_url) as (made, port),
            await AsyncDialogue.open(port) as client,
        ):
            await client.hello()

            async def send() -> None:
                assert (await client.mail("a@example.com", "b@example.com")).startswith("250")

            yield Leg(send, made.snapshot.primary.pool)

    @asynccontextmanager
    async def backup(address: str, messages_per_connection: int = 0, connection_age: float = AGE) -> AsyncIterator[Leg]:
        host, _, port = address.rpartition(":")
        contents = Contents(redis_client, "new")
        destination = replace(
            contents.destinations["new"],
            host=host,
            port=int(port),
            connections=1,
            messages_per_connection=messages_per_connection,
            connection_age=connection_age,
        )
        courier = Courier(settings(), destination, "worker", redis_url)
        await courier.start()

        async def send() -> None:
            message_id = contents.pending()
            await courier.deliver(f"job-{message_id}", [message_id])
            assert contents.pending_ids() == []

        yield Leg(send, courier._pool)
        await courier.drain()

    return {"primary": primary, "backup": backup}[request.param]


async def test_an_old_connection_gives_way_to_one_at_the_new_address(
    moving: tuple[ScriptedServer, ScriptedServer, Callable[[], None]], leg: Open
) -> None:
    """Until its age it is used, whatever DNS says; then it is closed with QUIT, and the name is resolved anew."""
    first, second, move = moving
    async with leg(f"{HOST}:{first.port}") as opened:
        await opened.send()
        opened.grow_older(AGE - 60)
        move()
        await opened.send()
        assert (len(first.connections), len(first.messages), len(second.messages)) == (1, 2, 0)
        opened.grow_older(60)
        await opened.send()
        await until(lambda: first.connections[0].closed == "quit")
        assert (len(first.messages), len(second.messages)) == (2, 1)


async def test_without_an_age_a_connection_lasts(
    moving: tuple[ScriptedServer, ScriptedServer, Callable[[], None]], leg: Open
) -> None:
    """0 is no limit."""
    first, second, move = moving
    async with leg(f"{HOST}:{first.port}", connection_age=0) as opened:
        await opened.send()
        move()
        opened.grow_older(1e6)
        await opened.send()
    assert (len(first.connections), len(first.messages), len(second.messages)) == (1, 2, 0)


@pytest.mark.parametrize(("most", "connections"), [(0, 1), (1, 25), (10, 3)])
async def test_so_many_messages_on_a_connection(
    primary: ScriptedServer, leg: Open, most: int, connections: int
) -> None:
    """No more than was set, and no connection more than that takes."""
    async with leg(primary.address, messages_per_connection=most) as opened:
        for _ in range(25):
            await opened.send()
    carried = [len(c.transactions) for c in primary.connections]
    assert sum(carried) == len(primary.messages) == 25
    assert len(carried) == connections
    assert max(carried) <= (most or 25)
