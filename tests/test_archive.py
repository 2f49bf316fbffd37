"""Failed copies beyond failed.max_bytes: their bodies are in files, everything else stays as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import redis

from ledger_contents import Contents, settings
from relay import archive, ledger, reading
from relay.envelope import BodyElsewhere
from scripted_server import ScriptedServer
from workers import failed
from workers.courier import Courier
from workers.sweep import Sweeper


def body(number: int) -> bytes:
    return b"Subject: %d\r\n\r\n..dots\r\n%s\r\n" % (number, os.urandom(2000).hex().encode())


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new")


def make_failed(contents: Contents, count: int) -> list[str]:
    ids = [contents.pending(body=body(n)) for n in range(count)]
    for message_id in ids:
        contents.fail(message_id)
    return ids


def in_redis(contents: Contents, message_id: str) -> bool:
    try:
        reading.message(contents.connection, message_id)
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
    assert [failed.export(contents.connection, i) for i in ids] == mail
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
    failed.retry(contents.connection, ids)
    assert all(in_redis(contents, i) for i in ids)


async def test_requeue_on_this_host_reads_the_file(
    contents: Contents, redis_url: str, tmp_path: Path, scripted: type[ScriptedServer]
) -> None:
    """A Requeue in rq-dashboard brings no body back: the courier reads the file."""
    server = scripted()
    (message_id,) = make_failed(contents, 1)
    list(archive.move_excess(contents.connection, tmp_path, 0))
    state = ledger.CopyState.from_wire(contents.connection.hget(ledger.FAILURE + "new", message_id))
    courier = Courier(settings(), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver(state.job, [message_id])
    await courier.drain()
    assert server.messages[0].header("Subject") == "0"
    assert archive.forget_delivered(contents.connection, tmp_path) == [message_id]
    assert not list(tmp_path.iterdir())


async def test_requeue_without_the_file_fails_again(
    contents: Contents, redis_url: str, tmp_path: Path, scripted: type[ScriptedServer]
) -> None:
    """Where the file is not, the copy goes back to the failed list and says where it is; nothing is lost."""
    server = scripted()
    (message_id,) = make_failed(contents, 1)
    list(archive.move_excess(contents.connection, tmp_path / "a", 0))
    (tmp_path / "a").rename(tmp_path / "b")
    state = ledger.CopyState.from_wire(contents.connection.hget(ledger.FAILURE + "new", message_id))
    courier = Courier(settings(), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver(state.job, [message_id])
    await courier.drain()
    (detail,) = failed.show(contents.connection, message_id)
    assert "run failed retry there" in detail.reply
    assert not server.messages
    (tmp_path / "b").rename(tmp_path / "a")
    assert b"Subject: 0" in failed.export(contents.connection, message_id)
