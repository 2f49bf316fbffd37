"""Connections are kept, bounded, shared in turn, and never handed out in a state that could hurt the next message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectFailed
from relay.client.pool import Pool, PoolExhausted
from relay.client.session_refusals import SessionRefusals
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts
from support.event_loops import at_end, both_loops
from support.reactions import Close, Gate, Silence
from support.scripted_server import ScriptedServer
from support.waiting import until

Scripted = Callable[..., ScriptedServer]
LONG = 20.0


def pool_for(server: ScriptedServer, limit: int = 2, seconds: float = LONG, messages: int = 10) -> Pool:
    destination = server.destination(messages_per_connection=messages)
    timeouts = Timeouts.of(seconds)
    pool = Pool(destination, local_hostname="relay.example", timeouts=timeouts, limit=limit)
    at_end.append(lambda: [connection.close() for connection in [*pool._idle, *pool._leased]])
    return pool


async def deliver(connection: Connection) -> None:
    connection.send(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"DATA")
    for _ in range(3):
        assert not (await connection.reply(timeout=LONG)).is_temporary
    connection.begin_data()
    connection.end_body(b"x\r\n")
    assert (await connection.reply(timeout=LONG)).is_positive
    connection.end_data()


async def turn() -> None:
    """Let every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@both_loops
async def test_the_last_used_is_used_first(scripted: Scripted):
    """Transactions one after the other share one connection; the others are left to grow old."""
    server = scripted()
    pool = pool_for(server)
    first, second = await pool.lease(), await pool.lease()
    assert (pool.in_use, pool.idle) == (2, 0)
    pool.give_back(second)
    pool.give_back(first)
    for _ in range(5):
        connection = await pool.lease()
        assert connection is first
        await deliver(connection)
        pool.give_back(connection)
    assert (pool.in_use, pool.idle) == (0, 2)
    assert len(server.connections) == 2
    await pool.close()
    await server.until(lambda: [c.closed for c in server.connections] == ["quit", "quit"])
    assert [len(c.transactions) for c in server.connections] == [5, 0]
    with pytest.raises(ClientError, match="closed"):
        await pool.lease()


@both_loops
async def test_waiting_in_line(scripted: Scripted):
    """When all are in use, who came first is served first; a late comer does not jump the line."""
    server = scripted()
    pool = pool_for(server, limit=1)
    held = await pool.lease()
    order: list[int] = []

    async def visitor(number: int) -> None:
        connection = await pool.lease()
        order.append(number)
        await connection.command(b"NOOP", timeout=LONG)
        pool.give_back(connection)

    visitors = []
    for number in range(5):
        visitors.append(asyncio.create_task(visitor(number)))
        await turn()
    assert pool.waiting == 5
    pool.give_back(held)
    visitors.append(asyncio.create_task(visitor(5)))
    await asyncio.gather(*visitors)
    assert order == [0, 1, 2, 3, 4, 5]
    assert len(server.connections) == 1
    assert (pool.in_use, pool.waiting) == (0, 0)


@both_loops
async def test_waiting_has_an_end(scripted: Scripted):
    """Who waits too long hears that all connections are in use, and leaves no trace in the line."""
    pool = pool_for(scripted(), limit=1)
    held = await pool.lease()
    with pytest.raises(PoolExhausted, match="all connections are in use: 1"):
        await pool.lease(timeout=0.05)
    assert (pool.in_use, pool.waiting) == (1, 0)
    pool.give_back(held)
    pool.give_back(await pool.lease(timeout=0))


@both_loops
async def test_cancelled_while_waiting(scripted: Scripted):
    """A waiter cancelled before or just after its turn came leaks nothing: the next one gets it."""
    pool = pool_for(scripted(), limit=1)
    held = await pool.lease()
    early, granted, last = (asyncio.create_task(pool.lease()) for _ in range(3))
    await turn()
    early.cancel()
    await turn()
    assert pool.waiting == 2
    pool.give_back(held)  # it is the turn of the second now, which does not know it yet
    granted.cancel()
    connection = await last
    assert early.cancelled()
    assert granted.cancelled()
    pool.give_back(connection)
    assert (pool.in_use, pool.idle, pool.waiting) == (0, 1, 0)


@both_loops
async def test_cancelled_while_connecting(scripted: Scripted):
    """A lease that is cancelled in the handshake gives its place back, and its socket."""
    server = scripted({"EHLO": [Silence(), None]})
    pool = pool_for(server, limit=1)
    leasing = asyncio.create_task(pool.lease())
    await server.until(lambda: bool(server.commands))
    leasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leasing
    assert pool.in_use == 0
    pool.give_back(await pool.lease())


@both_loops
async def test_a_failed_connect_frees_its_place(scripted: Scripted):
    """ConnectFailed passes through, and whoever waits behind tries in its turn."""
    gate = Gate()
    server = scripted({"CONNECT": [(gate, "554 no"), None]})
    pool = pool_for(server, limit=1)
    failing, waiting = asyncio.create_task(pool.lease()), asyncio.create_task(pool.lease())
    await gate.arrival()
    gate.open()
    with pytest.raises(ConnectFailed) as caught:
        await failing
    assert caught.value.stage == "greeting"
    pool.give_back(await waiting)
    assert (pool.in_use, pool.idle) == (0, 1)


@both_loops
async def test_what_is_not_kept(scripted: Scripted):
    """Closed, spoken to, owed a reply or left in DATA: such a connection is closed and never used again."""
    server = scripted({"NOOP": Silence(), "VRFY": b"252 x\r\n421 too\r\n"})
    pool = pool_for(server, limit=10)

    async def spoil(*lines: bytes) -> Connection:
        connection = await pool.lease()
        connection.send(*lines)
        return connection

    owed = await spoil(b"NOOP")
    pool.give_back(owed)
    half = await spoil(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"DATA")
    for _ in range(3):
        await half.reply(timeout=LONG)
    half.begin_data()
    await half.write_body(b"half a mess", timeout=LONG)
    pool.give_back(half)
    spoken = await spoil(b"VRFY x")
    await spoken.reply(timeout=LONG)
    await until(lambda: spoken.early_reply is not None)
    pool.give_back(spoken)
    closed = await pool.lease()
    closed.close()
    pool.give_back(closed)
    pool.give_back(closed)  # twice does no harm
    assert (pool.in_use, pool.idle) == (0, 0)
    await until(lambda: not any(c.is_open for c in (owed, half, spoken, closed)))
    await server.until(lambda: server.connections[1].closed == "eof")
    assert server.connections[1].verbs == ["EHLO", "MAIL", "RCPT", "DATA"]
    assert server.transactions[0].wire == b"half a mess"
    assert len(server.connections) == 4


@both_loops
async def test_an_unfinished_transaction_is_reset(scripted: Scripted):
    """A connection that comes back between MAIL and DATA is reset before the next transaction, which knows nothing of
    it; one whose server refuses the RSET is not used."""
    server = scripted({"RSET": [None, "451 no"]})
    pool = pool_for(server)
    for _ in range(2):
        connection = await pool.lease()
        assert (await connection.command(b"MAIL FROM:<old@example.com>", timeout=LONG)).is_positive
        assert (await connection.command(b"RCPT TO:<old@example.com>", timeout=LONG)).is_positive
        pool.give_back(connection)
    assert pool.idle == 1
    connection = await pool.lease()
    assert connection.transactions == 0
    await deliver(connection)
    pool.give_back(connection)
    assert [c.verbs for c in server.connections] == [
        ["EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "RSET"],
        ["EHLO", "MAIL", "RCPT", "DATA"],
    ]
    assert server.messages[0].recipients == ["b@example.com"]


@both_loops
async def test_a_reset_without_a_reply(scripted: Scripted):
    """It costs one time-out, however many are kept; a connection that would need another is not kept."""
    server = scripted({"RSET": Silence()})
    pool = pool_for(server, limit=9, seconds=2.0)
    connections = [await pool.lease() for _ in range(9)]
    clean = connections[0]
    for connection in connections:
        if connection is not clean:
            assert (await connection.command(b"MAIL FROM:<old@example.com>", timeout=LONG)).is_positive
        pool.give_back(connection)
    begun = asyncio.get_running_loop().time()
    leased = await pool.lease()
    assert leased is clean
    assert asyncio.get_running_loop().time() - begun < 12  # one after the other they would take sixteen
    assert (await leased.command(b"MAIL FROM:<old@example.com>", timeout=LONG)).is_positive
    pool.give_back(leased)
    assert pool.idle == 0
    await deliver(await pool.lease())
    assert sum("RSET" in c.verbs for c in server.connections) == 8


@both_loops
@pytest.mark.parametrize("farewell", ["421 4.4.2 idle for too long", ""])
async def test_kept_ones_that_died_are_replaced_unseen(scripted: Scripted, farewell: str):
    """Whoever leases gets a live connection, though the kept ones were closed by the server."""
    gate = Gate()
    server = scripted({"NOOP": ("250 ok", gate, farewell, Close())})
    pool = pool_for(server, limit=3)
    connections = [await pool.lease() for _ in range(3)]
    for connection in connections:
        await connection.command(b"NOOP", timeout=LONG)
        pool.give_back(connection)
    gate.open()
    await until(lambda: not any(c.is_open for c in connections))
    connection = await pool.lease()
    assert connection not in connections
    await deliver(connection)
    pool.give_back(connection)
    assert (pool.in_use, pool.idle) == (0, 1)


@both_loops
async def test_fresh_passes_over_the_kept(scripted: Scripted):
    """Asked for a fresh one, the pool connects, and the kept ones make room within the limit."""
    server = scripted()
    pool = pool_for(server, limit=1)
    kept = await pool.lease()
    pool.give_back(kept)
    connection = await pool.lease(fresh=True)
    assert connection is not kept
    await server.until(lambda: server.connections[0].closed == "quit")
    pool.give_back(connection)
    assert pool.idle == 1


@both_loops
async def test_bounds_on_what_is_kept(scripted: Scripted):
    """After so many transactions a connection ends with a QUIT."""
    server = scripted()
    pool = pool_for(server, messages=2)
    for _ in range(3):
        connection = await pool.lease()
        await deliver(connection)
        pool.give_back(connection)
    await server.until(lambda: server.connections[0].closed == "quit")
    assert [len(c.transactions) for c in server.connections] == [2, 1]
    await pool.close()


@both_loops
async def test_idle_ones_are_closed_in_time(scripted: Scripted, monkeypatch: pytest.MonkeyPatch):
    """After its idle time a kept connection is closed with a QUIT, and no timer is left when the pool is empty."""
    monkeypatch.setattr("relay.client.pool._IDLE_SECONDS", 0.1)
    server = scripted()
    pool = pool_for(server)
    first, second = await pool.lease(), await pool.lease()
    assert pool._reaper is None
    pool.give_back(first)
    pool.give_back(second)
    await until(lambda: pool.idle == 0)
    assert pool._reaper is None
    await server.until(lambda: [c.closed for c in server.connections] == ["quit", "quit"])
    pool.give_back(await pool.lease())
    assert len(server.connections) == 3
    await pool.close()


@both_loops
async def test_a_server_that_limits_connections(scripted: Scripted):
    """A 421 greeting while we hold others means to wait for one of ours, in front of those who came later."""
    server = scripted(max_connections=1)
    pool = pool_for(server, limit=3)
    held = await pool.lease()
    first = asyncio.create_task(pool.lease())
    await server.until(lambda: len(server.connections) == 2 and server.connections[1].closed)
    await until(lambda: pool.waiting == 1)
    second = asyncio.create_task(pool.lease())
    await turn()
    assert (pool.in_use, pool.waiting) == (1, 2)
    pool.give_back(held)
    assert await first is held
    assert not second.done()
    pool.give_back(held)
    assert await second is held
    with pytest.raises(PoolExhausted) as caught:
        await pool.lease(timeout=0.05)
    assert caught.value.reply == Reply(421, ("4.3.2 too many connections",))
    pool.give_back(held)
    assert len(server.connections) == 2  # nobody asked the server again meanwhile


@both_loops
async def test_a_421_without_others_is_a_failure(scripted: Scripted):
    """With no connection of ours in use there is nothing to wait for."""
    pool = pool_for(scripted({"CONNECT": "421 4.3.2 busy"}), limit=3)
    with pytest.raises(ConnectFailed) as caught:
        await pool.lease()
    assert caught.value.reply == Reply(421, ("4.3.2 busy",))
    results = await asyncio.gather(*(pool.lease() for _ in range(5)), return_exceptions=True)
    assert all(isinstance(r, ConnectFailed) for r in results)
    assert (pool.in_use, pool.waiting) == (0, 0)


@both_loops
async def test_close_while_in_use(scripted: Scripted):
    """Closing ends those who wait, lets those in use finish, and closes them when they come back."""
    server = scripted()
    pool = pool_for(server, limit=1)
    held = await pool.lease()
    waiting = asyncio.create_task(pool.lease())
    await turn()
    await pool.close()
    with pytest.raises(ClientError, match="closed"):
        await waiting
    await deliver(held)
    pool.give_back(held)
    await server.until(lambda: server.connections[0].closed == "quit")
    assert len(server.messages) == 1
    assert (pool.in_use, pool.idle) == (0, 0)


@both_loops
async def test_many_at_once(scripted: Scripted):
    """A crowd over a few connections, some cancelled at any moment: the bound holds and no place is lost."""
    server = scripted()
    pool = pool_for(server, limit=3, messages=20)
    most = 0

    async def visitor(number: int) -> None:
        nonlocal most
        connection = await pool.lease()
        try:
            most = max(most, len(pool._leased))
            await connection.command(b"NOOP", timeout=LONG)
            if number % 3:
                await deliver(connection)
        finally:
            pool.give_back(connection)

    tasks = [asyncio.create_task(visitor(number)) for number in range(200)]
    for task in tasks[::7]:
        await turn()
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(r) for r in results} <= {type(None), asyncio.CancelledError}
    assert most == 3
    assert (pool.in_use, pool.waiting) == (0, 0)
    assert pool.idle <= 3
    await pool.close()


@both_loops
async def test_a_refused_dot_is_followed_by_a_rset(scripted: Scripted):
    """A server may have that transaction open still, and would refuse the next MAIL as nested."""
    server = scripted({".": ["554 5.7.1 no", None]})
    pool = Pool(
        server.destination(), local_hostname="relay.example", timeouts=Timeouts.of(LONG), limit=2, max_refusals=5
    )
    at_end.append(lambda: [connection.close() for connection in [*pool._idle, *pool._leased]])
    for code in (554, 250, 250):
        connection = await pool.lease()
        connection.send(b"MAIL FROM:<>", b"RCPT TO:<b@example.com>", b"DATA")
        for _ in range(3):
            await connection.reply(timeout=LONG)
        connection.begin_data()
        connection.end_body(b"x\r\n")
        assert (await connection.reply(timeout=LONG)).code == code
        connection.end_data()
        pool.give_back(connection)
    assert server.connections[0].verbs == ["EHLO", *["MAIL", "RCPT", "DATA", "RSET"], *["MAIL", "RCPT", "DATA"] * 2]


def test_only_the_same_refusal_confirms_one_in_doubt():
    """What a new connection refuses with other words says nothing of what the old one said."""
    refusals = SessionRefusals(lambda: 0.0)
    nested, other = Reply.of(503, "5.5.1 Error: nested MAIL command"), Reply.of(554, "5.7.1 access denied")
    for heard, is_doubtful in ((other, True), (nested, False), (Reply.of(250, "ok"), True)):
        refusals.settle(nested, [heard])
        assert refusals.is_doubtful(nested) is is_doubtful
