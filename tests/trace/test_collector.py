"""The collector: what cannot be written is counted and told once, and the next hour's events are written again."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay import metrics
from relay.config.model import TraceSettings
from relay.mail import encryption
from relay.stopping import StopEvent
from relay.trace import emitter, files
from relay.trace.collector import Collector
from relay.trace.lookup import Unseen
from support.traced import Traced, delivered

HOUR = 3600


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    found = Traced(tmp_path)
    yield found
    found.close()


def dropped() -> float:
    return metrics.trace_dropped._value.get()


def test_a_damaged_file_is_set_aside_while_it_is_written(traced: Traced, capfd: pytest.CaptureFixture[str]) -> None:
    """The events go to a new one, and a line names the old one."""
    traced.write(traced.received())
    (file,) = files.listed(traced.folder)
    traced.collector._close()
    file.path.write_bytes(b"\0" * 4096 + os.urandom(8192))
    before = dropped()
    traced.write(mine := traced.received())
    assert [life.id for life in traced.find("bob@b.example")] == [mine[1]]
    assert (traced.folder / files.CORRUPT / file.path.name).exists()
    assert dropped() == before


def test_a_file_that_breaks_under_the_writer(traced: Traced) -> None:
    """Pages that were overwritten by something else: set aside, and the batch is not lost."""
    traced.write(*(traced.received(message_id=f"<{n}@x.example>") for n in range(500)))
    opened = traced.collector._open
    assert opened is not None
    opened._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with opened.file.path.open("r+b") as damaged:
        damaged.seek(4096)
        damaged.write(os.urandom(opened.file.path.stat().st_size - 4096))
    opened._connection.execute("PRAGMA cache_size = 0")
    opened._connection.execute("PRAGMA shrink_memory")
    mine = [traced.received(message_id=f"<again{n}@x.example>") for n in range(50)]
    traced.write(*mine)
    traced.write(*(traced.received(message_id=f"<more{n}@x.example>") for n in range(50)))
    assert traced.find("<more7@x.example>")
    assert len(list((traced.folder / files.CORRUPT).iterdir())) >= 1


@pytest.mark.parametrize("trouble", ["a file in its place", "no room", "a link"])
def test_what_cannot_be_written_is_dropped_and_counted(tmp_path: Path, trouble: str) -> None:
    """Nothing is raised; when it can be written again, it is."""
    traced = Traced(tmp_path)
    if trouble == "no room":
        traced.collector._min_free = 1 << 60
    elif trouble == "a link":
        (tmp_path / "trace").symlink_to(tmp_path / "elsewhere")
    else:
        (tmp_path / "trace").write_text("mine")
    before = dropped()
    traced.write(traced.received(), traced.received())
    assert dropped() == before + 2
    if trouble == "no room":
        traced.collector._min_free = 0
    else:
        (tmp_path / "trace").unlink()
    traced.write(mine := traced.received())
    assert [life.id for life in traced.find("bob@b.example")] == [mine[1]]
    traced.close()


def test_a_full_disk_in_the_middle_of_a_write(traced: Traced) -> None:
    """SQLite says that the disk is full: the batch goes as a whole, what was written stays."""
    traced.write(first := traced.received())
    opened = traced.collector._open
    assert opened is not None
    pages = opened._connection.execute("PRAGMA page_count").fetchone()[0]
    opened._connection.execute(f"PRAGMA max_page_count = {pages}")
    before = dropped()
    traced.write(*(traced.received(message_id=f"<{n}@full.example>") for n in range(200)))
    assert dropped() == before + 200
    assert traced.find(first[1])
    assert traced.find("@full.example") == []
    traced.write(traced.received(message_id="<later@full.example>"))  # it opens the file anew
    assert traced.find("<later@full.example>")


def test_the_cap_and_the_age(tmp_path: Path) -> None:
    """The oldest hours go as a whole; what is written now stays, in parts if one hour alone is too much."""
    traced = Traced(tmp_path, TraceSettings(max_bytes=4 << 20, keep=5 * HOUR))
    for n in range(10):
        traced.write(traced.received(message_id=f"<{n}@a.example>"))
        traced.now += HOUR
    traced.collector.sweep()
    hours = {file.hour for file in files.listed(traced.folder)}
    assert len(hours) == 5
    text = "x" * 900
    for n in range(14):
        traced.write(*(traced.received(f"{text}{n}.{m}@a.example", message_id=f"<{n}.{m}@b>") for m in range(300)))
        traced.collector.sweep()
        assert sum(file.octets for file in files.listed(traced.folder)) < 10 << 20
    assert traced.find("<13.299@b>")
    assert traced.find("<9@a.example>") == []
    traced.close()


def test_a_clock_that_is_set_back(traced: Traced) -> None:
    """Events go to the hour that the clock shows; nothing that is there is deleted for being from the future."""
    traced.write(first := traced.received())
    traced.now -= 5 * HOUR
    traced.write(second := traced.received())
    traced.collector.sweep()
    traced.now -= 40 * 365 * 24 * HOUR
    traced.write(traced.received())
    traced.collector.sweep()
    assert {first[1], second[1]} <= {life.id for life in traced.find("bob@b.example")}


def test_what_another_role_writes_is_read_too(tmp_path: Path) -> None:
    """`relay` and `workers` beside each other on one state folder: two files of the hour, one life."""
    relay, workers = Traced(tmp_path, role="relay"), Traced(tmp_path, role="workers")
    relay.write(mine := relay.received())
    workers.write(delivered(mine[1]))
    (life,) = relay.find("bob@b.example")
    assert life.status == "delivered"
    assert len(files.listed(relay.folder)) == 2
    relay.close()
    workers.close()


def test_a_killed_collector_is_gone_on_from(tmp_path: Path) -> None:
    """Its file has a journal beside it; the next one, and who reads meanwhile, find all that was written."""
    traced = Traced(tmp_path)
    traced.write(mine := traced.received())
    (file,) = files.listed(traced.folder)
    copies = {path: path.read_bytes() for path in file.all_paths if path.exists()}
    assert len(copies) > 1
    traced.close()
    for path, content in copies.items():
        path.write_bytes(content)
    again = Traced(tmp_path)
    assert [life.id for life in again.find("bob@b.example")] == [mine[1]]
    again.write(other := again.received())
    assert {life.id for life in again.find("bob@b.example")} == {mine[1], other[1]}
    again.close()


@pytest.mark.parametrize("data", [b"", b"x", b"[]", b"[[]]", b"[7]", b"[[1,2,3]", b"\xff", b"[" * 60_000,
                                  b'[["m","1m8fa6pnt0ekf003",1]]', b'[["m",["1m8fa6pnt0ekf003"],1]]',
                                  b'[["t","1m8fa6pnt0ekf003",1,[7]]]'])  # fmt: skip
def test_a_datagram_that_makes_no_sense(traced: Traced, data: bytes) -> None:
    """It is dropped, and the next is taken."""
    traced.writing.send(data)
    traced.write(mine := traced.received("\udc80\ud800@a.example"))
    assert [life.id for life in traced.find("bob@b.example")] == [mine[1]]


def test_sealed_files(tmp_path: Path) -> None:
    """With storage.key_file nothing of a message is readable; a file without its key is named, the others answered."""
    traced = Traced(tmp_path)
    key_file = tmp_path / "keys"
    encryption.add_key(key_file)
    before = encryption.ring()
    try:
        encryption.use(None)
        traced.write(plain := traced.received(message_id="<plain@a.example>"))
        encryption.use(key_file)
        traced.write(sealed := traced.received("carol@c.example", message_id="<sealed@a.example>"))
        assert len(files.listed(traced.folder)) == 2
        assert {life.id for life in traced.find("bob@b.example")} == {plain[1], sealed[1]}
        traced.close()
        content = files.listed(traced.folder)[1].path.read_bytes()
        for word in (b"carol", b"b.example", b"queued as", sealed[1].encode()):
            assert word not in content
        encryption.use(None)
        unseen = Unseen()
        again = Traced(tmp_path)
        assert [life.id for life in again.find("bob@b.example", unseen=unseen)] == [plain[1]]
        assert len(unseen.damaged) == 1
        assert "storage.key_file" in unseen.damaged[0]
        again.close()
    finally:
        encryption._ring = before


def test_the_collector_ends_with_what_is_there_written(tmp_path: Path) -> None:
    """A stop in order loses nothing, and leaves one file that can be read from where nothing can be written."""
    traced = Traced(tmp_path)
    stop = StopEvent()
    thread = threading.Thread(target=traced.collector.run, args=(stop,))
    thread.start()
    traced.send(mine := traced.received())
    stop.set()
    thread.join()
    (file,) = files.listed(traced.folder)
    assert [path.exists() for path in file.all_paths] == [True, False, False, False]
    with closing(sqlite3.connect(f"file:{file.path}?mode=ro&immutable=1", uri=True)) as connection, connection:
        assert connection.execute("SELECT count(*) FROM rows").fetchone() == (1,)
    connection.close()
    assert traced.find(mine[1])
    traced.close()


# Who sends -------------------------------------------------------------------------------------------------------


def test_nobody_reads(tmp_path: Path) -> None:
    """The collector is dead or stopped: what the kernel does not take is kept to a bound, then dropped and counted."""
    reading, writing = emitter.channel()
    sender = emitter.Emitter(writing)
    waiting: list[Callable[[], None]] = []

    class Loop:
        """Remembers what it is to call."""

        call_later = None

        def call_soon_threadsafe(self, *_: object) -> None:
            waiting.append(sender.flush)

    sender.use(Loop())
    before = dropped()
    traced = Traced(tmp_path)
    event = traced.received("a" * 900 + "@a.example")
    sent = 0
    while dropped() == before:
        for _ in range(200):
            sender.note(event)
            sent += 1
        waiting.clear()
        sender.flush()
        assert sent < 100_000
    assert sender._octets <= emitter._KEPT
    assert waiting  # it tries again
    # The collector is back: what is kept arrives.
    pending: dict[str, object] = {}
    collector = Collector(TraceSettings(), tmp_path, "up", reading, min_free=0)
    while sender._ready:
        collector._count = 0
        collector.collect()
        sender.flush()
    assert collector._pending or pending == {}
    collector._count = 0
    collector.collect()
    received = sum(len(texts) for texts, _ in collector._pending.values())
    assert received + (dropped() - before) == sent
    traced.close()
    for end in (reading, writing):
        end.close()


def test_a_channel_that_is_broken(tmp_path: Path) -> None:
    """Whatever the socket does, nothing is raised."""
    reading, writing = emitter.channel()
    reading.close()
    sender = emitter.Emitter(writing)
    traced = Traced(tmp_path)
    before = dropped()
    sender.note(traced.received())
    writing.close()
    sender.note(traced.received())
    sender.note(["m", object()])
    assert dropped() == before + 3
    traced.close()


def test_very_many_recipients_and_a_group_that_is_too_large(tmp_path: Path) -> None:
    """They are sent in parts, and all are found."""
    traced = Traced(tmp_path)
    sender = emitter.Emitter(traced.writing)
    emitter.take(None)
    events = [traced.received(f"{'s' * 200}{n}@a.example", message_id=f"<{n}@a.example>") for n in range(300)]
    for event in events:
        sender._events.append(event)
    sender.flush()
    traced.collector.collect()
    traced.collector.write()
    assert len(traced.find("bob@b.example", limit=1000)) == 300
    assert json.dumps(events[0])
    traced.close()
