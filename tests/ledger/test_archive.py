"""Failed copies beyond failed.max_bytes: their bodies are in files, everything else stays as it was."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from loguru import logger

from relay import ownership, private_files
from relay.command.connection import ledger_of
from relay.ledger import archive, copy_state, keys, queries
from relay.ledger.continuity import Continuity
from relay.mail.record import BodyElsewhere, Message
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from workers.delivery.courier import Courier
from workers.queues import failed
from workers.upkeep.sweep import Sweeper


def body(number: int) -> bytes:
    return b"Subject: %d\r\n\r\n..dots\r\n%s\r\n" % (number, os.urandom(2000).hex().encode())


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Return what the log is told."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)))
    yield lines
    logger.remove(sink)


def make_failed(contents: Contents, count: int) -> list[str]:
    ids = [contents.pending(body=body(n)) for n in range(count)]
    for message_id in ids:
        contents.fail(message_id)
    return ids


def in_redis(contents: Contents, message_id: str) -> bool:
    try:
        queries.message(contents.connection, message_id)
    except BodyElsewhere:
        return False
    return True


def test_the_oldest_bodies_move(contents: Contents, tmp_path: Path) -> None:
    """Beyond the limit bodies move to files, the oldest first; list, show and export tell the same as before."""
    ids = make_failed(contents, 20)
    before = [failed.show(contents.connection, i) for i in ids]
    mail = [failed.export(contents.connection, i) for i in ids]
    report = Sweeper(contents.connection, settings(state_dir=str(tmp_path), failed_max_bytes="30000")).sweep()
    there = [in_redis(contents, i) for i in ids]
    assert 0 < there.count(False) < 20
    assert there == sorted(there)
    assert report.counts["failed.max_bytes exceeded"] == there.count(False)
    assert [failed.show(contents.connection, i) for i in ids] == before
    assert [failed.export(contents.connection, i, archive.folder(tmp_path)) for i in ids] == mail
    assert (archive.folder(tmp_path) / ids[0]).stat().st_mode & 0o777 == 0o600


def test_what_is_pending_elsewhere_stays(redis_client: redis.Redis, tmp_path: Path) -> None:
    """A body that another backup still waits for is not moved."""
    contents = Contents(redis_client, "new", "other")
    message_id = contents.pending(to=("new", "other"), body=body(0))
    contents.fail(message_id)
    assert not list(archive.move_excess(redis_client, tmp_path, 0))
    assert in_redis(contents, message_id)


def test_retry_brings_the_body_back(contents: Contents, tmp_path: Path) -> None:
    """`failed retry` needs no file on the worker's host: the body is in Redis again before the job."""
    ids = make_failed(contents, 3)
    assert len(list(archive.move_excess(contents.connection, tmp_path, 0))) == 3
    listed_copies.retry(contents.connection, ids, folder=tmp_path)
    assert all(in_redis(contents, i) for i in ids)


async def test_requeue_on_this_host_reads_the_file(
    contents: Contents, redis_url: str, tmp_path: Path, scripted: type[ScriptedServer]
) -> None:
    """A Requeue in rq-dashboard brings no body back: the courier reads the file."""
    server = scripted()
    (message_id,) = make_failed(contents, 1)
    folder = archive.folder(tmp_path)
    list(archive.move_excess(contents.connection, folder, 0))
    state = copy_state.CopyState.from_wire(contents.connection.hget(keys.FAILURE + "new", message_id))
    courier = Courier(settings(state_dir=str(tmp_path)), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver(state.job, [message_id])
    await courier.drain()
    assert server.messages[0].header("Subject") == "0"
    assert archive.forget_delivered(contents.connection, folder) == [message_id]
    assert not list(folder.glob(message_id + "*"))
    assert not contents.connection.keys(keys.MOVED + "*")


async def test_requeue_without_the_file_fails_again(
    contents: Contents, redis_url: str, tmp_path: Path, scripted: type[ScriptedServer]
) -> None:
    """Where the file is not, the copy goes back to the failed list and says where it is; nothing is lost."""
    server = scripted()
    (message_id,) = make_failed(contents, 1)
    list(archive.move_excess(contents.connection, tmp_path / "a", 0))
    (tmp_path / "a").rename(tmp_path / "b")
    state = copy_state.CopyState.from_wire(contents.connection.hget(keys.FAILURE + "new", message_id))
    courier = Courier(settings(), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver(state.job, [message_id])
    await courier.drain()
    (detail,) = failed.show(contents.connection, message_id)
    assert "run failed retry there" in detail.reply
    assert not server.messages
    (tmp_path / "b").rename(tmp_path / "a")
    assert b"Subject: 0" in failed.export(contents.connection, message_id, tmp_path / "a")


FOREIGN = ("../../../tmp/x", "/etc/passwd", ".", "..", "a/b", "0123456789ABCDEF", "0123456789abcdef0", "\x1b", "\udcff")


@pytest.mark.parametrize("name", FOREIGN)
def test_no_listed_id_names_a_file(contents: Contents, tmp_path: Path, name: str) -> None:
    """Whoever can write to Redis writes no file of ours: only a message's own id is the name of one."""
    connection = contents.connection
    (message_id,) = make_failed(contents, 1)
    octets = name.encode("utf-8", "surrogateescape")
    record = connection.get(keys.MESSAGE + message_id)
    connection.set(keys.MESSAGE.encode() + octets, record.replace(message_id.encode(), octets))
    connection.zadd(keys.FAILED + "new", {octets: 1.0})
    connection.hset(keys.FAILURE + "new", octets, copy_state.CopyState().to_wire())
    state = tmp_path / "state"
    Sweeper(connection, settings(state_dir=str(state), failed_max_bytes="0")).sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    assert sorted(p.name for p in archive.folder(state).iterdir()) == sorted([message_id, "identity"])


def test_what_redis_names_is_no_file(contents: Contents, tmp_path: Path) -> None:
    """A record that says that its body is in some file is not answered with that file, nor with a link's."""
    connection = contents.connection
    folder = archive.folder(tmp_path / "state")
    secret = tmp_path / "secret"
    one, two, three, four = make_failed(contents, 4)
    records = {i: connection.get(keys.MESSAGE + i) for i in (one, two, three, four)}
    secret.write_bytes(records[one])
    for message_id, record in records.items():
        stub = Message.stub(record, socket.gethostname(), str(secret))
        connection.set(keys.MESSAGE + message_id, stub)
    private_files.folder(folder)
    (folder / two).symlink_to(secret)
    (folder / three).write_bytes(records[one])  # another's
    os.mkfifo(folder / four)
    stubs = {i: connection.get(keys.MESSAGE + i) for i in records}
    listed_copies.retry(connection, list(records), folder=folder)
    assert {i: connection.get(keys.MESSAGE + i) for i in records} == stubs
    for message_id in records:
        with pytest.raises(BodyElsewhere):
            failed.export(connection, message_id, folder)


def test_a_damaged_file_does_not_come_back(contents: Contents, tmp_path: Path) -> None:
    """Whatever has become of a file, only the message's own record comes back from it."""
    ids = make_failed(contents, 8)
    assert len(list(archive.move_excess(contents.connection, tmp_path, 0))) == 8
    for number, message_id in enumerate(ids):
        record = bytearray((tmp_path / message_id).read_bytes())
        if number % 2:
            record[number * len(record) // 9] ^= 4
        else:
            record = record[: number * len(record) // 9] or record + b"\0"
        (tmp_path / message_id).write_bytes(record)
    listed_copies.retry(contents.connection, ids, folder=tmp_path)
    assert not any(in_redis(contents, i) for i in ids)


def test_a_foreign_file_is_not_deleted(contents: Contents, tmp_path: Path) -> None:
    """What an operator keeps beside the bodies stays."""
    (message_id,) = make_failed(contents, 1)
    list(archive.move_excess(contents.connection, tmp_path, 0))
    (tmp_path / "README").write_text("mine")
    (tmp_path / "folder").mkdir()
    listed_copies.drop_failed(contents.connection, [message_id])
    assert archive.forget_delivered(contents.connection, tmp_path) == [message_id]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README", "folder", "identity"]


def emptied(connection: redis.Redis) -> None:
    connection.flushall()


def partly_lost(connection: redis.Redis) -> None:
    """All messages and lists are gone; what knows that they were here is not."""
    for key in connection.scan_iter("smtpdup:*"):
        if not key.startswith((b"smtpdup:moved:", b"smtpdup:failed:")):
            connection.delete(key)


@pytest.mark.parametrize("lost", [emptied, partly_lost, "older"])
def test_a_redis_that_came_back_empty_or_older_costs_no_body(
    contents: Contents, tmp_path: Path, lost: Callable[[redis.Redis], None] | str, logged: list[str]
) -> None:
    """What is on disk is kept and told, sweep after sweep, whatever the ledger that is there now does not name."""
    connection = contents.connection
    before = {key: connection.dump(key) for key in connection.scan_iter()}
    ids = make_failed(contents, 3)
    sweeper = Sweeper(connection, settings(state_dir=str(tmp_path), failed_max_bytes="0"))
    assert sweeper.sweep().counts["failed.max_bytes exceeded"] == 3
    if isinstance(lost, str):
        connection.flushall()
        for key, value in before.items():
            connection.restore(key, 0, value)
    else:
        lost(connection)
    for _ in range(2):
        sweeper.sweep(thorough=True)
        Sweeper(connection, settings(state_dir=str(tmp_path), failed_max_bytes="0")).sweep(thorough=True)
    assert sorted(p.name for p in archive.folder(tmp_path).iterdir()) == sorted([*ids, "identity"])
    if lost is not partly_lost:
        assert sum("that Redis does not know are kept" in line for line in logged) == 1


def test_bodies_of_a_version_without_the_set_are_deleted_when_delivered(contents: Contents, tmp_path: Path) -> None:
    """What an older version moved is known by its record in Redis, from the first sweep on."""
    (message_id,) = make_failed(contents, 1)
    list(archive.move_excess(contents.connection, tmp_path, 0))
    contents.connection.delete(*contents.connection.keys(keys.MOVED + "*"))
    (tmp_path / "identity").unlink()
    assert archive.forget_delivered(contents.connection, tmp_path) == []
    listed_copies.drop_failed(contents.connection, [message_id])
    assert archive.forget_delivered(contents.connection, tmp_path) == [message_id]


def test_a_body_that_redis_loses_while_it_moves_stays(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the file and the stub Redis may come back empty: then the file is all there is."""
    (message_id,) = make_failed(contents, 1)
    write = private_files.write

    def write_and_lose(where: Path, name: str, data: bytes) -> None:
        write(where, name, data)
        if name == message_id:
            contents.connection.flushall()

    monkeypatch.setattr(private_files, "write", write_and_lose)
    assert not list(archive.move_excess(contents.connection, tmp_path, 0))
    archive.forget_delivered(contents.connection, tmp_path)
    assert (tmp_path / message_id).exists()


def test_bodies_leave_a_redis_that_fills_up(tmp_path: Path, redis_factory: Callable[..., RedisServer]) -> None:
    """Failed bodies leave before new mail would go to the spool, and a retry of all brings back what has room."""
    server = redis_factory(maxmemory="24mb")
    with redis.Redis.from_url(server.url) as connection:
        contents = Contents(connection, "new")
        count = 0
        while archive.memory(connection)[0] < 0.8 * (24 << 20):
            contents.fail(contents.pending(body=b"Subject: x\r\n\r\n" + os.urandom(50_000).hex().encode() + b"\r\n"))
            count += 1
        sweeper = Sweeper(connection, settings(state_dir=str(tmp_path), failed_max_bytes="10G"))
        moved = sweeper.relieve()
        assert 0 < moved < count
        used, limit = archive.memory(connection)
        assert used < 0.55 * limit
        assert listed_copies.retry(connection, listed_copies.EVERY, folder=archive.folder(tmp_path)) == count
        used, limit = archive.memory(connection)
        assert used < 0.62 * limit
        assert any(not in_redis(contents, copy.id) for copy in listed_copies.failures(connection))


NOBODY = 65534


@pytest.fixture
def service_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a state folder that belongs to the service's user, with us as root, as `sudo smtp-dup queue verify` is."""
    if os.geteuid():
        pytest.skip("needs root")
    monkeypatch.setattr(ownership, "_trusted", {0})
    state_dir = tmp_path / "state"
    state_dir.mkdir(mode=0o700)
    os.chown(state_dir, NOBODY, NOBODY)
    return state_dir


def test_what_root_makes_belongs_to_the_owner_of_the_state_folder(
    contents: Contents, service_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the service could write, and read, nothing there any more; its own files root may read."""
    ids = make_failed(contents, 5)
    options = settings(state_dir=str(service_state), failed_max_bytes="1")
    options = replace(options, redis=options.redis.at("redis://unused"))
    monkeypatch.setattr("relay.command.connection.sync_client", lambda *_, **__: nullcontext(contents.connection))
    monkeypatch.setattr("relay.command.connection.encryption.use", lambda _: None)  # the test's own keys, with --sealed
    with ledger_of(options) as connection:
        Sweeper(connection, options).sweep()
        Continuity([], service_state).look(connection)
    made = list(service_state.rglob("*"))
    assert {path.name for path in made} >= {"failed", "ledger.json", *ids}
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(NOBODY, NOBODY)}
    assert failed.export(contents.connection, ids[0], archive.folder(service_state))


def test_a_body_that_may_not_be_read_is_said_to_be_that(contents: Contents, service_state: Path) -> None:
    """Not that it is on another host: nobody would look at the rights of a file here."""
    (message_id,) = make_failed(contents, 1)
    where = archive.folder(service_state)
    assert list(archive.move_excess(contents.connection, where, 0))  # by root, for root alone
    os.seteuid(NOBODY)
    try:
        with pytest.raises(BodyElsewhere, match=r"cannot read: Permission denied; .* owner of") as caught:
            failed.export(contents.connection, message_id, where)
    finally:
        os.seteuid(0)
    assert "kept on host" not in str(caught.value)
    (where / message_id).unlink()
    with pytest.raises(BodyElsewhere, match="kept on host"):
        failed.export(contents.connection, message_id, where)
