"""The spool as files: durable before it says so, private, honest about a full disk, and readable by its successor."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from relay.ledger.changes import Released
from relay.mail.ids import IdSource
from relay.spool import locks, writer
from relay.spool.writer import Spool
from support.waiting import wait_until

_ids = IdSource()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool"


@pytest.fixture
async def mine(folder: Path) -> AsyncIterator[Spool]:
    """The spool as one relay process sees it."""
    under_test = Spool(folder, _ids.owner)
    yield under_test
    await under_test.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in writer.messages(folder).iterdir())


async def test_states(mine: Spool, folder: Path) -> None:
    """A message is staged, then due, uncertain or gone; what is not here is left to the ledger."""
    one, two, three = (_ids.next() for _ in range(3))
    for message_id in (one, two, three):
        await mine.write(message_id, b"record")
    assert names(folder) == [f"{i}-6.staged" for i in (one, two, three)]
    assert await mine.release(one)
    assert await mine.hold(two)
    assert await mine.discard(three)
    assert names(folder) == [f"{one}-6.ready", f"{two}-6.held"]
    assert (writer.messages(folder) / f"{one}-6.ready").read_bytes() == b"record"
    for change in (mine.release, mine.hold, mine.discard):
        assert not await change(one)
        assert not await change(_ids.next())


async def test_nobody_else_can_read_it(mine: Spool, folder: Path) -> None:
    """Files are 0600, folders 0700."""
    await mine.write(_ids.next(), b"record")
    await mine.note_discard(_ids.next())
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_everything_is_fsynced_in_order(mine: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its name, the folder after it, and only then the answer."""
    await mine.open()
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def watched_rename(*args: object, **kwargs: object) -> None:
        steps.append("rename")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    message_id = _ids.next()
    await mine.write(message_id, b"record")
    assert steps == ["file", "rename", "folder"]
    await mine.release(message_id)
    assert steps[3:] == ["rename", "folder"]


async def test_many_share_an_fsync_of_the_folder(mine: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred messages at once do not cost a hundred fsyncs of the folder."""
    await mine.open()
    folders = 0
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        nonlocal folders
        folders += stat.S_ISDIR(os.fstat(descriptor).st_mode)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    await asyncio.gather(*(mine.write(_ids.next(), b"record") for _ in range(100)))
    assert len(names(folder)) == 100
    assert folders < 50


async def test_a_failed_fsync_is_no_durable_copy(mine: Spool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error at the very end is an error of all that depended on it."""
    await mine.open()
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    message_id = _ids.next()
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="Input/output error"):
            await mine.write(message_id, b"record")
        assert mine.has(message_id)
    assert await mine.discard(message_id)
    assert names(folder) == []


async def test_min_free(folder: Path) -> None:
    """It refuses while the disk has room, to leave that room to Redis; a note is always small enough."""
    free = os.statvfs(folder.parents[1])
    small = Spool(folder, _ids.owner, min_free=free.f_frsize * free.f_blocks)
    with pytest.raises(OSError, match=r"spool.min_free") as refusal:
        await small.write(_ids.next(), b"record")
    assert refusal.value.errno == errno.ENOSPC
    assert names(folder) == []
    await small.note_discard(message_id := _ids.next())
    assert names(folder) == [f"{message_id}.discard"]
    await small.close()


async def test_full_disk(small_disk: Callable[[int], Path]) -> None:
    """A full disk refuses and leaves nothing half written; what was there stays; space that comes back is used."""
    disk = small_disk(1)
    mine = Spool(disk / "spool", _ids.owner)
    kept = [_ids.next() for _ in range(5)]
    for message_id in kept:
        await mine.write(message_id, bytes(150_000))
    with pytest.raises(OSError, match="No space left"):
        await mine.write(refused := _ids.next(), bytes(400_000))
    assert await mine.discard(refused)
    assert [e.id for e in writer.scan(disk / "spool")] == kept
    assert await mine.release(kept[0])
    assert await mine.discard(kept[1])
    await mine.write(_ids.next(), bytes(400_000))
    await mine.close()


async def test_a_folder_that_comes_later(folder: Path) -> None:
    """A disk that is not there yet refuses; once it is there it is used."""
    folder.parents[1].joinpath("state").write_text("in the way")
    mine = Spool(folder, _ids.owner)
    with pytest.raises(OSError, match=str(folder.parent)):
        await mine.write(_ids.next(), b"record")
    folder.parent.unlink()
    await mine.write(_ids.next(), b"record")
    assert len(names(folder)) == 1
    await mine.close()


async def test_notes(mine: Spool, folder: Path) -> None:
    """A note is there until Redis knows; without one there is nothing to remove."""
    released = Released(_ids.next(), ("new",), "digest", ("b\udce9@example.com",))
    await mine.note_release(released)
    await mine.note_release(released)
    assert names(folder) == [f"{released.id}.release"]
    await mine.strike(released.id)
    await mine.strike(released.id)
    assert names(folder) == []


async def test_summary(mine: Spool, folder: Path) -> None:
    """Count, octets, age of the oldest, and what is set aside; no spool and no folder are empty."""
    assert writer.summary(None) == writer.SpoolSummary()
    assert writer.summary(folder) == writer.SpoolSummary()
    first = _ids.next()
    await mine.write(first, b"12345")
    await mine.write(_ids.next(), b"1234567")
    await mine.note_discard(_ids.next())
    (folder / "corrupt" / "x").write_bytes(b"?")
    an_hour_ago = time.time() - 3600
    os.utime(writer.messages(folder) / f"{first}-5.staged", (an_hour_ago, an_hour_ago))
    found = writer.summary(folder)
    assert (found.messages, found.bytes, found.corrupt) == (2, 12, 1)
    assert 3600 <= found.oldest_age_s < 3700


OWNER = """
import asyncio, sys
from pathlib import Path
from relay.spool.writer import Spool
async def run():
    spool = Spool(Path(sys.argv[1]), sys.argv[2])
    await spool.open()
    print("open", flush=True)
    await asyncio.sleep(600)
asyncio.run(run())
"""


async def test_an_owner_lives_as_long_as_its_process(folder: Path) -> None:
    """SIGKILL ends it at once, a SIGSTOP does not, and a name in use is not taken twice."""
    writer.prepare(folder)
    assert not locks.is_alive(folder, "dead")
    source = str(Path(writer.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), "abcd"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": source},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        assert locks.is_alive(folder, "abcd")
        process.send_signal(signal.SIGSTOP)
        assert locks.is_alive(folder, "abcd")
        locks.forget(folder, "abcd")
        assert locks.is_alive(folder, "abcd")
        twin = Spool(folder, "abcd")
        with pytest.raises(OSError, match="temporarily unavailable"):
            await twin.write(_ids.next(), b"record")
        await twin.close()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    wait_until(lambda: not locks.is_alive(folder, "abcd"))
    locks.forget(folder, "abcd")
    assert list((folder / "owners").iterdir()) == []


def test_oldest_first(folder: Path) -> None:
    """Whatever the order of the folder, the oldest id comes first; foreign files are told apart."""
    writer.prepare(folder)
    made = [_ids.next() for _ in range(20)]
    for message_id in reversed(made):
        (writer.messages(folder) / f"{message_id}-4.ready").write_bytes(b"mail")
    (writer.messages(folder) / "notes.txt").write_bytes(b"?")
    (writer.messages(folder) / ".hidden").write_bytes(b"?")
    found = writer.scan(folder)
    assert [e.id for e in found if e.state == "ready"] == made
    assert [e.name for e in found if not e.state] == ["notes.txt"]
