"""Copies that a relay hands over: tried at once, each once, and never without a job when they are given back."""

from __future__ import annotations

import asyncio
import math
import random
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from relay import unix_sockets
from relay.handover.frames import FRESH_SECONDS, Hello, Limits, folder_of, read_hello
from relay.handover.handover import Handover, Offer
from relay.ledger import changes, health, keys
from relay.ledger.changes import Released
from relay.ledger.copy_state import CopyState
from support.ledger_contents import Contents, settings
from support.reactions import Gate
from support.scripted_server import ScriptedServer
from support.waiting import PATIENCE, until
from workers.delivery import first_tries
from workers.delivery.courier import Courier
from workers.delivery.intake import Intake
from workers.delivery.outbox import Change, Outbox
from workers.jobs import Interrupted
from workers.queues import failed
from workers.rqworker import live_jobs


@pytest.fixture(autouse=True)
def all_are_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """However densely they come."""
    monkeypatch.setattr("relay.handover.density.MOST", 1_000_000)


class Pair:
    """A relay's end and a courier in one loop, and the ledger between them."""

    def __init__(self, contents: Contents, redis_url: str, backup: ScriptedServer, folder: Path) -> None:
        self.contents = contents
        self.courier = Courier(
            settings(state_dir=str(folder)),
            backup.destination("new"),
            "worker",
            redis_url,
            takes_first_tries=True,
        )
        self.handover = Handover(folder, redis_url)
        self.handed: list[str] = []
        self.refused: list[str] = []
        self.handover.on_handed = lambda _, ids: self.handed.extend(ids)
        self.handover.on_refused = lambda _, copies: self.refused.extend(copy.id for copy in copies)

    def offer(self, message_id: str) -> Offer | None:
        record = self.contents.connection.get(keys.MESSAGE + message_id)
        assert isinstance(record, bytes)
        self.handover.keep(message_id, (record,), ("new",))
        return self.handover.offer(message_id, ("new",))

    def is_wanted(self, message_id: str) -> bool:
        """Say whether a worker would take a copy, which it does not get."""
        offer = self.offer(message_id)
        if offer is not None:
            offer.give_up()
        return offer is not None

    def released(self, message_id: str, holders: Sequence[str] = ("worker",)) -> None:
        with self.contents.connection.pipeline() as pipe:
            changes.release(pipe, [Released(message_id, ("new",), holders=tuple(holders))])
            assert pipe.execute() == [[1]]

    def hand(self, *ids: str) -> list[str]:
        """Release messages as a relay does; returns those that nobody took."""
        left = []
        for message_id in ids:
            offer = self.offer(message_id)
            self.released(message_id, offer.holders if offer else ())
            if offer:
                offer.send(changes.now(self.contents.connection))
            else:
                left.append(message_id)
        return left

    def in_jobs(self) -> set[str]:
        queued = {message_id for ids in self.contents.queued().values() for message_id in ids}
        return queued | self.in_scheduled_jobs()

    def in_scheduled_jobs(self) -> set[str]:
        queue = self.contents.queue()
        jobs = map(queue.fetch_job, queue.scheduled_job_registry.get_job_ids())
        return {message_id for job in jobs if job is not None for message_id in job.args[1]}

    def pending(self) -> int:
        return int(self.contents.connection.zcard(keys.PENDING + "new"))


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


@asynccontextmanager
async def pair(contents: Contents, redis_url: str, backup: ScriptedServer, folder: Path) -> AsyncIterator[Pair]:
    made = Pair(contents, redis_url, backup, folder)
    await made.courier.start()
    following = asyncio.ensure_future(made.handover.follow())
    try:
        probe = contents.staged()
        await until(lambda: made.is_wanted(probe))
        yield made
    finally:
        backup.replies.clear()
        backup.drop()
        await made.courier.drain()
        following.cancel()
        made.handover.close()


async def test_tried_at_once(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """Without a job the copy arrives, once; the job that comes later finds nothing, and costs no fetch of a body."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        ids = [contents.staged() for _ in range(30)]
        assert made.hand(*ids) == []
        await until(lambda: len(backup.messages) == 30 and not made.pending())
        await made.courier.deliver("job", ids)
    assert len(backup.messages) == 30
    assert made.handed == ids
    assert not contents.connection.exists(keys.BUSY + "new", keys.HOLDERS + "new")
    assert not list(folder_of(tmp_path).iterdir())


async def test_a_job_beside_it(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """The job of what is under way, or on its way over the socket, ends at once and repeats nothing."""
    gate = Gate()
    async with pair(contents, redis_url, backup, tmp_path) as made:
        backup.replies["."] = (gate, None)
        ids = [contents.staged() for _ in range(5)]
        made.hand(*ids)
        await asyncio.sleep(0)  # sent, and not yet read
        await asyncio.wait_for(made.courier.deliver("job", ids), 5)
        assert made.pending() == 5
        gate.open()
        await until(lambda: not made.pending())
    assert len(backup.messages) == 5


async def test_deferred_has_a_job(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """What is deferred after its own job has been and gone is scheduled."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        backup.replies["RCPT"] = "450 4.2.0 greylisted"
        ids = [contents.staged() for _ in range(5)]
        made.hand(*ids)
        await until(lambda: made.in_jobs() == set(ids))
        states = contents.connection.hgetall(keys.OWN + "new")
        assert len(states) == 5
        assert not contents.connection.zcard(keys.BUSY + "new")


async def test_given_back_with_job(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """A server that goes away, and a drain: what has not been tried gets a job and loses its lease."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        backup.replies["MAIL"] = "421 4.3.2 going away"
        ids = [contents.staged() for _ in range(20)]
        made.hand(*ids)
        await until(lambda: made.in_jobs() == set(ids), 30)
        assert not contents.connection.zcard(keys.BUSY + "new")
        later = contents.staged()
        await until(lambda: not made.is_wanted(later))  # its job tries it
    assert made.pending() == 20


async def test_retried_while_it_is_in_hand(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path
) -> None:
    """One recipient failed, another is deferred with the rest of the turn: an operator's retry is not forgotten."""
    gate = Gate()
    async with pair(contents, redis_url, backup, tmp_path) as made:
        backup.replies |= {"RCPT TO:<no@": "550 5.1.1 no", "RCPT TO:<later@": "450 4.2.0 later", ".": (gate, None)}
        slow, split = contents.staged(), contents.staged("no@test", "later@test")
        made.hand(slow, split)
        await until(lambda: contents.failed_ids() == [split])
        assert failed.retry_copies(contents.connection, "new", [split]) == 1
        ((job, ids),) = contents.queued().items()
        await made.courier.deliver(job, ids)
        assert split in made.in_scheduled_jobs()
        gate.open()
        await until(lambda: len(backup.messages) == 1)


async def test_the_job_before_the_answer(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job of what is given back may be fetched before the answer that says so: it has its copies all the same."""
    written, answered = threading.Event(), threading.Event()

    def slowly(box: Outbox, changes: list[Change]) -> None:
        change(box, changes)
        written.set()
        assert answered.wait(PATIENCE)

    async with pair(contents, redis_url, backup, tmp_path) as made:
        change = Outbox._change
        monkeypatch.setattr(Outbox, "_change", slowly)
        backup.replies["MAIL"] = "421 4.3.2 going away"
        given_back = contents.staged()
        made.hand(given_back)
        await until(written.is_set)
        (job,) = contents.queue().jobs
        delivery = asyncio.ensure_future(made.courier.deliver(job.id, job.args[1]))
        await asyncio.wait({delivery}, timeout=0.1)
        answered.set()
        with pytest.raises(Interrupted):  # it had the copy in hand
            await asyncio.wait_for(delivery, PATIENCE)


async def test_held_or_throttled(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """An operator's hold or throttle ends the hand-over; released, it goes on."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        probe = contents.staged()
        _hold(contents, held=True)
        await until(lambda: not made.is_wanted(probe))
        _hold(contents, held=False)
        await until(lambda: made.is_wanted(probe))
        _throttle(contents, 5.0)
        await until(lambda: not made.is_wanted(probe))
        _throttle(contents, 0.0)
        await until(lambda: made.is_wanted(probe))


def _hold(contents: Contents, *, held: bool) -> None:
    if held:
        health.hold(contents.connection, "new", 600.0, "test", "me")
    else:
        health.release(contents.connection, "new")


def _throttle(contents: Contents, rate: float) -> None:
    with contents.connection.pipeline() as pipe:
        health.throttle(pipe, "new", rate, 0)
        pipe.execute()


async def test_what_comes_late_is_claimed(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path
) -> None:
    """A relay that stood still between release and hand-over: whoever has the lease by then keeps it."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        ours, others, settled = (contents.staged() for _ in range(3))
        offers = [made.offer(i) for i in (ours, others, settled)]
        made.released(ours)
        made.released(others, ["another"])
        made.released(settled, [""])
        await made.courier.deliver("job", [settled])
        for offer in offers:
            assert offer is not None
            offer.at = time.monotonic() - 2 * FRESH_SECONDS
            offer.send(1.0)
        await until(lambda: len(backup.messages) == 2)
        await until(lambda: made.pending() == 1)
        assert contents.connection.hget(keys.HOLDERS + "new", others) == b"another"
    assert len(backup.messages) == 2


async def test_released_and_never_handed_over(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay killed between the two: the worker gives the lease back, with a job."""
    monkeypatch.setattr(first_tries, "FRESH_SECONDS", 0.1)
    async with pair(contents, redis_url, backup, tmp_path) as made:
        lost = contents.staged()
        made.released(lost)
        made.handover.close()
        await until(lambda: made.in_jobs() == {lost}, 10)
        assert not contents.connection.exists(keys.BUSY + "new")


async def test_a_large_record_and_none(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path
) -> None:
    """What is large is left to its job; a record that is damaged on the way is read from the ledger."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        large = contents.staged(body=b"Subject: x\r\n\r\n" + _noise(120 << 10))
        assert made.hand(large) == [large]
        whole = contents.staged()
        offer = made.offer(whole)
        assert offer is not None
        made.released(whole)
        offer._record = offer._record[:-4] + b"xxxx"
        offer.send(1.0)
        await until(lambda: len(backup.messages) == 1)
        await until(lambda: made.pending() == 1)


def _noise(octets: int) -> bytes:
    source = random.Random(1)
    lines = (bytes(source.randrange(48, 123) for _ in range(70)) for _ in range(octets // 72))
    return b"\r\n".join(lines) + b"\r\n"


async def test_a_worker_that_stands_still(contents: Contents, redis_url: str, tmp_path: Path) -> None:
    """The relay never waits: what the kernel does not take is refused, and the memory that it takes is bounded."""
    listener = unix_sockets.listening(_folder(tmp_path), "new.sock", 1)
    handover = Handover(tmp_path, redis_url)
    handed: list[str] = []
    refused: list[str] = []
    handover.on_handed = lambda _, ids: handed.extend(ids)
    handover.on_refused = lambda _, copies: refused.extend(copy.id for copy in copies)
    following = asyncio.ensure_future(handover.follow())
    await until(lambda: bool(handover._lines))
    sock, _ = listener.accept()
    hello = Hello("new", "worker", handover._ledger)
    sock.sendall(hello.packed() + Limits(10_000, 1 << 30).packed())
    source = contents.staged()
    offered = 0
    await until(lambda: handover._line_of("new", 0) is not None)
    while offered < 2000:
        handover.keep(source, (bytes(32 << 10),), ("new",))
        if (offer := handover.offer(source, ("new",))) is None:
            break
        offered += 1
        offer.send(1.0)
        await asyncio.sleep(0)
    assert refused
    assert len(handed) + len(refused) == offered < 1000  # it was hung up on, or is left alone for a while
    following.cancel()
    handover.close()
    sock.close()
    listener.close()


async def test_a_worker_that_says_nothing(
    contents: Contents, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that gives no receipt for what it was sent, since it is stopped, gets no more until it does."""
    monkeypatch.setattr("relay.handover.worker_line._SILENCE", 0.05)
    listener = unix_sockets.listening(_folder(tmp_path), "new.sock", 1)
    handover = Handover(tmp_path, redis_url)
    following = asyncio.ensure_future(handover.follow())
    await until(lambda: bool(handover._lines))
    sock, _ = listener.accept()
    sock.sendall(Hello("new", "worker", handover._ledger).packed() + Limits(100, 1 << 20).packed())
    await until(lambda: handover._line_of("new", 0) is not None)
    await asyncio.sleep(0.1)
    assert handover._line_of("new", 0) is not None  # it was sent nothing
    message_id = contents.staged()
    handover.keep(message_id, (b"x",), ("new",))
    offer = handover.offer(message_id, ("new",))
    assert offer is not None
    offer.send(1.0)
    await until(lambda: handover._line_of("new", 0) is None)
    sock.sendall(Limits(100, 1 << 20).packed())
    await until(lambda: handover._line_of("new", 0) is not None)
    following.cancel()
    handover.close()
    sock.close()
    listener.close()


async def test_receipt_and_renewal(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker says soon that a single copy has come, and makes its short lease a long one."""
    monkeypatch.setattr("workers.delivery.leases._RENEW_FRESH", 0.0)
    gate = Gate()
    async with pair(contents, redis_url, backup, tmp_path) as made:
        backup.replies["."] = (gate, None)
        (line,) = made.handover._lines.values()
        copy = contents.staged()
        made.hand(copy)

        def lease() -> float:
            end = contents.connection.zscore(keys.BUSY + "new", copy)
            assert isinstance(end, float)
            return end - changes.now(contents.connection)

        assert lease() <= changes.HANDED_SECONDS
        await until(lambda: bool(made.handed))
        await until(lambda: line._unheard_since == math.inf)
        await until(lambda: lease() > changes.HANDED_SECONDS)
        gate.open()
        await until(lambda: not made.pending())


async def test_an_older_ledger(contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path) -> None:
    """What this worker has delivered is not sent again, unless another's copy was moved here since, for others.

    First tries count for what a worker knows of the ledger: an older one is noticed before anything of it is sent.
    """
    connection = contents.connection
    async with pair(contents, redis_url, backup, tmp_path) as made:
        copy, other = contents.staged(), contents.pending()
        record = connection.get(keys.MESSAGE + copy)
        assert isinstance(record, bytes)
        made.hand(copy)
        await until(lambda: made.pending() == 1)

        async def again(since: float = 0.0) -> None:
            connection.set(keys.MESSAGE + copy, record)
            connection.zadd(keys.PENDING + "new", {copy: changes.now(connection) - 60})
            connection.hset(keys.OWN + "new", copy, CopyState(since=since).to_wire())
            await made.courier.deliver("job", [copy])
            await until(lambda: made.pending() == 1)

        await again()
        assert len(backup.messages) == 1
        await again(since=changes.now(connection) + 1)
        assert len(backup.messages) == 2
        known = made.courier._claiming
        connection.hset(keys.LEDGER, mapping={"id": "this", "count": 1000})
        known._heard = None
        await until(lambda: known._heard is not None and known._heard.progress >= 1000)
        connection.hset(keys.LEDGER, "count", 5)
        await made.courier.deliver("job", [other])
        assert connection.hget(keys.LEDGER, "cause") == b"older"
        await until(lambda: not made.pending())


async def test_a_folder_that_was_removed(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made again; a drain leaves nothing there."""
    monkeypatch.setattr("workers.delivery.intake._MISSING_SECONDS", 0.0)
    async with pair(contents, redis_url, backup, tmp_path):
        shutil.rmtree(folder_of(tmp_path))
        await until(lambda: bool(list(folder_of(tmp_path).glob("*.sock"))))
        another = Handover(tmp_path, redis_url)
        following = asyncio.ensure_future(another.follow())
        await until(lambda: another._line_of("new", 0) is not None)
        following.cancel()
        another.close()
    assert not list(folder_of(tmp_path).iterdir())


def _folder(state_dir: Path) -> Path:
    folder = folder_of(state_dir)
    folder.mkdir(0o700)
    return folder


async def test_what_makes_no_sense_is_hung_up_on(
    contents: Contents, redis_url: str, backup: ScriptedServer, tmp_path: Path
) -> None:
    """Rubbish on the worker's socket ends that connection, in one line, and nothing else."""
    async with pair(contents, redis_url, backup, tmp_path) as made:
        (name,) = (path.name for path in folder_of(tmp_path).iterdir())
        assert (folder_of(tmp_path) / name).stat().st_mode & 0o777 == 0o600
        sock = unix_sockets.connected(folder_of(tmp_path), name, patience=5)
        assert sock is not None
        sock.sendall(b"\xff" * 4096)
        sock.setblocking(False)
        await until(lambda: _is_closed(sock))
        sock.close()
        ids = [contents.staged() for _ in range(3)]
        assert made.hand(*ids) == []
        await until(lambda: not made.pending())
    assert len(backup.messages) == 3


def _is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


async def test_long_names(tmp_path: Path) -> None:
    """The longest name of a backup, and a state folder far below the root, are no hindrance."""
    state_dir = tmp_path / ("f" * 100)
    state_dir.mkdir()
    hello = Hello("n" * 100, "worker", "")
    intake = Intake(state_dir, hello, lambda: (1, 1), lambda _: None, lambda: None)
    intake.open()
    (name,) = (path.name for path in folder_of(state_dir).iterdir())
    sock = unix_sockets.connected(folder_of(state_dir), name, patience=5)
    assert sock is not None
    sock.setblocking(False)
    received = bytearray()
    while read_hello(received) != hello:
        received += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 4096), PATIENCE)
    sock.close()
    intake.close()


async def test_a_dead_ones_socket_is_removed(redis_url: str, tmp_path: Path) -> None:
    """A name where nobody listens is of a dead worker."""
    unix_sockets.listening(_folder(tmp_path), "new.1.1.sock", 1).close()
    handover = Handover(tmp_path, redis_url)
    following = asyncio.ensure_future(handover.follow())
    await until(lambda: not list(folder_of(tmp_path).iterdir()))
    following.cancel()


def test_a_dead_workers_copies_get_a_job(contents: Contents) -> None:
    """The next worker ends the leases of the dead one: what it had from memory may have no job any more."""
    handed = contents.pending()
    contents.claim("job", handed, worker="dead")
    live_jobs.put_back_leased(contents.connection, "new", "dead")
    (job,) = contents.queue().jobs
    assert job.args == ["new", [handed]]
    (claim,) = contents.claim("another", handed, worker="next")
    assert claim.before == "dead"
