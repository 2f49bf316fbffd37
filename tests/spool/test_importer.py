"""Spooled messages are imported once, in order, whichever process dies in between; unreadable files are kept."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import redis
import redis.asyncio

from relay import private_files
from relay.ledger import changes, keys, registry
from relay.ledger.changes import Released, Staged
from relay.ledger.copy_state import CopyState
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.server import background
from relay.spool import importer, writer
from relay.spool.importer import Importer
from relay.spool.writer import Spool
from support import batches
from support.ledger_contents import Contents
from support.redis_servers import RedisServer
from support.waiting import until

NEW = Destination("new", "localhost", 25)


class Place:
    """A spool with its importer, on a Redis."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.ids = IdSource()
        self.url = url
        self.client = redis.Redis.from_url(url)
        self.spool = Spool(folder, self.ids.owner)
        self.ledger = Contents(self.client)

    def message(self, text: str = "text", to: tuple[str, ...] = ("new",), ids: IdSource | None = None) -> Message:
        body = f"Message-ID: <{text}@test>\r\n\r\n{text}\r\n".encode()
        envelope = Envelope(
            id=(ids or self.ids).next(),
            sender="a@test",
            recipients=(Recipient("b@test"),),
            received_at=0.0,
            size=len(body),
            destinations=to,
        )
        return Message(envelope, body)

    async def spooled(self, message: Message, state: str = "ready") -> str:
        message_id = message.envelope.id
        await self.spool.write(message_id, message.pack())
        if state == "ready":
            await self.spool.release(message_id)
        elif state == "held":
            await self.spool.hold(message_id)
        return message_id

    def abandoned(self, state: str, text: str = "text") -> str:
        """Put a message there as a process that is dead now would have."""
        message = self.message(text, ids=IdSource())
        record = message.pack()
        self.put(f"{message.envelope.id}-{len(record)}.{state}", record)
        return message.envelope.id

    def put(self, name: str, data: bytes) -> Path:
        path = writer.messages(self.folder) / name
        path.write_bytes(data)
        return path

    def names(self) -> list[str]:
        return sorted(path.name for path in writer.messages(self.folder).iterdir())

    def corrupt(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "corrupt").iterdir())

    def stage(self, message: Message) -> None:
        with self.client.pipeline() as pipe:
            batches.stage(pipe, [Staged(message.envelope.id, message.packed(), changes.now(self.client) + 600)])
            pipe.execute()

    def uncertain(self) -> list[str]:
        return [i.decode() for i in self.client.zrange(keys.UNCERTAIN, 0, -1)]

    def staged(self) -> list[str]:
        return [i.decode() for i in self.client.zrange(keys.STAGED, 0, -1)]

    def settle(self, message_id: str) -> None:
        with self.client.pipeline() as pipe:
            changes.settle(pipe, "new", [message_id])
            pipe.execute()

    def waiting(self, name: str, count: int = 1000, octets: int = 10 << 20) -> None:
        """Have a backup's copies fill Redis."""
        with self.client.pipeline() as pipe:
            pipe.zadd(keys.PENDING + name, {f"old{n}": n + 1 for n in range(count)})
            pipe.mset({f"{keys.MESSAGE}old{n}": bytes(octets // count) for n in range(count)})
            pipe.execute()

    def delivered(self, name: str, count: int = 1000) -> None:
        """Undo ``waiting``."""
        with self.client.pipeline() as pipe:
            pipe.zrem(keys.PENDING + name, *(f"old{n}" for n in range(count)))
            pipe.delete(*(f"{keys.MESSAGE}old{n}" for n in range(count)))
            pipe.execute()

    def backlog(self, name: str) -> list[str]:
        """Return the ids that wait on disk for a backup alone."""
        return sorted(n[:16] for n in writer.names(writer.backlog(self.folder, name)))

    @asynccontextmanager
    async def importing(self, destinations: tuple[Destination, ...] = (NEW,)) -> AsyncIterator[Importer]:
        async with AsyncExitStack() as ends:
            connection = redis.asyncio.Redis.from_url(self.url)
            ends.push_async_callback(connection.aclose)
            watch = Monitor(connection, seconds=2)
            await watch.look()
            dispatcher = Dispatcher(connection)
            ends.push_async_callback(dispatcher.drain)
            under_test = Importer(
                self.folder, connection, dispatcher, watch, destinations=destinations, hold_seconds=3600
            )
            task = asyncio.get_running_loop().create_task(under_test.run())
            looking = asyncio.get_running_loop().create_task(_look(watch))
            yield under_test
            under_test.stop()
            await task
            await background.end(looking)

    async def imported(self) -> None:
        """Run an importer until it has looked at everything."""
        async with self.importing() as under_test:
            begun = under_test.passes
            await until(lambda: under_test.passes > begun)


async def _look(watch: Monitor) -> None:
    while await watch.look() is not None:
        await asyncio.sleep(0.05)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importer, "_LOOK_SECONDS", 0.05)


@pytest.fixture
async def place(tmp_path: Path, redis_url: str) -> AsyncIterator[Place]:
    under_test = Place(tmp_path / "spool", redis_url)
    await under_test.spool.open()
    yield under_test
    await under_test.spool.close()
    under_test.client.close()


async def test_due_messages_get_jobs(place: Place) -> None:
    """Each is pending under its own id, oldest first, with a job, and its file is gone."""
    made = [await place.spooled(place.message(str(n))) for n in range(250)]
    await place.imported()
    assert place.ledger.pending_ids() == made
    assert sorted(i for ids in place.ledger.queued().values() for i in ids) == made
    assert all(place.ledger.has_body(i) for i in made)
    assert place.staged() == place.uncertain() == place.names() == []


async def test_a_file_goes_when_its_job_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importer that is cut off in between leaves the file, from which its successor makes the job."""
    message_id = await place.spooled(place.message("one"))

    async def cut_off(*_: object) -> None:
        raise redis.ConnectionError("in between")

    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "put", cut_off)
        async with place.importing():
            await until(lambda: place.ledger.pending_ids() == [message_id])
    assert place.names() != []
    assert place.ledger.queued() == {}
    await place.imported()
    assert list(place.ledger.queued().values()) == [[message_id]]
    assert place.names() == []


async def test_a_crash_before_the_file_is_gone(place: Place) -> None:
    """What has come in is not brought in again, pending or delivered; its job is made again, which does no harm."""
    pending = await place.spooled(place.message("pending"))
    settled = await place.spooled(place.message("settled"))
    copies = {path: path.read_bytes() for path in writer.messages(place.folder).iterdir()}
    await place.imported()
    place.settle(settled)
    for path, data in copies.items():
        path.write_bytes(data)
    await place.imported()
    assert place.ledger.pending_ids() == [pending]
    assert not place.ledger.has_body(settled)
    assert place.staged() == place.names() == []


async def test_a_crash_before_an_uncertain_file_is_gone(place: Place) -> None:
    """A held message that has come in stays uncertain, with its body, however often its file is seen."""
    held = await place.spooled(place.message(), "held")
    (path,) = writer.messages(place.folder).iterdir()
    data = path.read_bytes()
    await place.imported()
    path.write_bytes(data)
    await place.imported()
    assert place.uncertain() == [held]
    assert place.ledger.has_body(held)
    assert place.names() == []


async def test_staged_in_redis_as_well(place: Place) -> None:
    """A stage that timed out but was written: the message is pending once and not staged."""
    message = place.message()
    place.stage(message)
    message_id = await place.spooled(message)
    await place.imported()
    assert place.ledger.pending_ids() == [message_id]
    assert place.staged() == []


@pytest.mark.parametrize("settled", [True, False])
async def test_staged_in_redis_after_the_import(place: Place, monkeypatch: pytest.MonkeyPatch, settled: bool) -> None:
    """A stage that arrives last of all does not become due by itself one day; a copy that is pending keeps its body."""
    message = place.message()
    message_id = await place.spooled(message)
    await place.imported()
    if settled:
        place.settle(message_id)
    place.stage(message)
    monkeypatch.setattr(importer, "_FORGET_AFTER", -1)
    await place.imported()
    assert place.staged() == []
    assert place.ledger.pending_ids() == ([] if settled else [message_id])
    assert place.ledger.has_body(message_id) == (not settled)
    assert not place.client.keys(keys.IMPORTED + "*")


async def test_uncertain_in_redis_as_well(place: Place) -> None:
    """What a successor took for uncertain is due once when the spool knows better."""
    message = place.message()
    place.stage(message)
    place.client.zadd(keys.UNCERTAIN, {message.envelope.id: 1})
    place.client.zrem(keys.STAGED, message.envelope.id)
    message_id = await place.spooled(message)
    await place.imported()
    assert place.ledger.pending_ids() == [message_id]
    assert place.uncertain() == []


async def test_already_released_in_redis(place: Place) -> None:
    """An id that is pending already stays as it is."""
    message = place.message()
    place.stage(message)
    with place.client.pipeline() as pipe:
        changes.release(pipe, [Released(message.envelope.id, ("new",))])
        pipe.execute()
    place.client.zadd(keys.PENDING + "new", {message.envelope.id: 12345})
    await place.spooled(message)
    await place.imported()
    assert place.client.zscore(keys.PENDING + "new", message.envelope.id) == 12345
    assert place.names() == []


async def test_only_the_dead_are_inherited(place: Place) -> None:
    """A staged message of a living process is left alone; one of a dead process is uncertain, for its twin to find."""
    living = await place.spooled(place.message("living"), "staged")
    dead = place.abandoned("staged", "dead")
    half = place.put(f"{IdSource().next()}-100.tmp", b"half")
    writing = place.put(f"{place.ids.next()}-100.tmp", b"half")
    await place.imported()
    assert place.uncertain() == [dead]
    assert dead.encode() in place.client.hgetall(keys.TWINS).values()
    assert place.names() == sorted([writing.name, *(n for n in place.names() if n.startswith(living))])
    assert len(place.names()) == 2
    assert place.corrupt() == []
    assert [p.name for p in (place.folder / "unfinished").iterdir()] == [half.name]
    assert writer.summary(place.folder).unfinished == 1
    assert [p.name for p in (place.folder / "owners").iterdir()] == [place.ids.owner]


async def test_what_cannot_be_read_is_kept(place: Place) -> None:
    """Corrupt, cut off, misnamed or foreign files are set aside as they are, and the others come in."""
    good = await place.spooled(place.message("good"))
    record = place.message().pack()
    files = {
        f"{place.ids.next()}-{len(record)}.ready": record[:-1],
        f"{place.ids.next()}-4.ready": b"\0\0\0\0",
        f"{place.ids.next()}-0.held": b"",
        f"{place.ids.next()}-{len(record)}.ready ": record,
        f"{place.ids.next()}-999999.ready": record,
        f"{IdSource().next()}.release": b"[]",
        "letter.txt": b"?",
    }
    for name, data in files.items():
        place.put(name, data)
    await place.imported()
    assert place.ledger.pending_ids() == [good]
    assert place.names() == []
    assert {name: (place.folder / "corrupt" / name).read_bytes() for name in place.corrupt()} == files
    assert writer.summary(place.folder).corrupt == len(files)


async def test_notes_of_the_dead(place: Place) -> None:
    """What a dead process could not tell Redis is told: accepted is due, refused is gone. The living tell it."""
    accepted, refused, mine = place.message("1", ids=IdSource()), place.message("2", ids=IdSource()), place.message("3")
    for message in (accepted, refused, mine):
        place.stage(message)
    note = json.dumps(Released(accepted.envelope.id, ("new",), "", ("b@test",))._asdict()).encode()
    place.put(f"{accepted.envelope.id}.release", note)
    place.put(f"{refused.envelope.id}.discard", b"{}")
    await place.spool.note_discard(mine.envelope.id)
    await place.imported()
    assert place.ledger.pending_ids() == [accepted.envelope.id]
    assert place.ledger.queued()
    assert place.staged() == [mine.envelope.id]
    assert not place.ledger.has_body(refused.envelope.id)
    assert place.names() == [f"{mine.envelope.id}.discard"]


async def test_one_importer(place: Place) -> None:
    """A second one waits, and takes over when the first has gone."""
    async with place.importing() as first:
        await until(lambda: first.passes)
        async with place.importing() as second:
            message_id = await place.spooled(place.message())
            await until(lambda: place.names() == [])
            assert not second.passes
            first.stop()
            await until(lambda: second.passes)
    assert place.ledger.pending_ids() == [message_id]


async def test_a_destination_that_redis_never_met(place: Place) -> None:
    """Copies for a backup of earlier settings are pending for it, and the ledger knows how to reach it."""
    old = Destination("old", "old.example.com", 2525)
    async with place.importing((old,)) as first:
        await until(lambda: first.passes)
    place.client.flushall()
    message_id = await place.spooled(place.message(to=("old",)))
    await place.imported()
    assert registry.destinations(place.client)["old"] == old
    assert place.ledger.pending_ids("old") == [message_id]
    assert place.ledger.queued("old")


async def test_room_first(tmp_path: Path, redis_factory: Callable[..., RedisServer]) -> None:
    """Nothing comes in for those who wait while Redis is more than 60 % full, and nothing that would overfill it."""
    server = redis_factory(maxmemory="16mb")
    place = Place(tmp_path / "spool", server.url)
    await place.spool.open()
    place.waiting("new")
    huge = await place.spooled(_big(place, 14 << 20))
    small = await place.spooled(_big(place, 1 << 20))
    async with place.importing() as under_test:
        await until(lambda: under_test.waits > 3)
        assert len(place.names()) == 2
        place.delivered("new")
        await until(lambda: [n[:16] for n in place.names()] == [huge])
        assert place.ledger.pending_ids() == [small]
        place.settle(small)
        place.client.config_set("maxmemory", "64mb")
        await until(lambda: place.ledger.pending_ids() == [huge])
    await place.spool.close()
    place.client.close()


def _big(place: Place, size: int) -> Message:
    return _sized(place, size, ("new",))


def _sized(place: Place, size: int, to: tuple[str, ...]) -> Message:
    body = os.urandom(size).replace(b".", b",")[:-2] + b"\r\n"
    envelope = Envelope(place.ids.next(), "a@test", (Recipient("b@test"),), 0.0, len(body), destinations=to)
    return Message(envelope, body)


async def test_a_record_that_redis_refuses(
    tmp_path: Path, redis_factory: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays where it is, and those beside and behind it come in."""
    monkeypatch.setattr("relay.ledger.monitor._CALM_SECONDS", 0.0)
    server = redis_factory(proto_max_bulk_len="1mb")
    place = Place(tmp_path / "spool", server.url)
    first = await place.spooled(place.message("1"))
    bad = await place.spooled(_big(place, (1 << 20) + 1000))
    last = await place.spooled(place.message("2"))
    monkeypatch.setattr(importer, "_BATCH_BYTES", 4 << 20)
    async with place.importing():
        await until(lambda: [n[:16] for n in place.names()] == [bad])
    assert place.ledger.pending_ids() == [first, last]
    await place.spool.close()
    place.client.close()


async def test_redis_goes_away_in_between(
    tmp_path: Path, redis_factory: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and restarted while hundreds of messages come in: each is there once."""
    monkeypatch.setattr("relay.ledger.monitor._CALM_SECONDS", 0.5)
    server = redis_factory()
    place = Place(tmp_path / "spool", server.url)
    made = [await place.spooled(place.message(str(n))) for n in range(300)]

    async def at_least(count: int) -> None:
        await until(lambda: len(place.names()) <= 300 - count, interval=0)

    async with place.importing():
        await at_least(100)
        server.kill()
        await asyncio.to_thread(server.start)
        await at_least(200)
        server.kill()
        await asyncio.to_thread(server.start)
        await at_least(300)
        await until(lambda: len(place.ledger.pending_ids()) == 300)
    assert sorted(place.ledger.pending_ids()) == made
    assert place.staged() == []
    await place.spool.close()
    place.client.close()


# One backup does not take its copies -----------------------------------------------------------------------------

OLD = Destination("old.example.com:25", "old.example.com", 25)
BOTH = ("new", OLD.name)


@pytest.fixture
async def tight(tmp_path: Path, redis_factory: Callable[..., RedisServer]) -> AsyncIterator[Place]:
    """A Redis that is nearly full of what one backup does not take."""
    server = redis_factory(maxmemory="16mb")
    under_test = Place(tmp_path / "spool", server.url)
    await under_test.spool.open()
    under_test.waiting(OLD.name)
    yield under_test
    await under_test.spool.close()
    under_test.client.close()


async def test_one_backup_does_not_hold_up_another(tight: Place) -> None:
    """Each gets its copy as soon as it takes them: the one at once, the other, whose copies wait on disk, at last."""
    made = [await tight.spooled(tight.message(str(n), BOTH)) for n in range(250)]
    async with tight.importing((NEW, OLD)):
        for message_id in made:
            await until(lambda i=message_id: i in tight.ledger.pending_ids())
            tight.settle(message_id)
        await until(lambda: tight.names() == [])
        assert tight.backlog(OLD.name) == made
        found = writer.summary(tight.folder)
        assert (found.messages, found.backlogs) == (250, {OLD.name: 250})
        assert not tight.ledger.has_body(made[0])
        tight.delivered(OLD.name)
        await until(lambda: tight.ledger.pending_ids(OLD.name) == made)
        await until(lambda: writer.backlogs(tight.folder) == [])
    assert tight.ledger.pending_ids() == []
    assert sorted(i for ids in tight.ledger.queued(OLD.name).values() for i in ids) == made
    assert all(tight.ledger.has_body(i) for i in made)
    assert writer.backlogs(tight.folder) == []


async def test_a_crash_while_copies_are_shared_out(tight: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two steps, and with room for the other in the meantime: each share comes in once."""
    made = [await tight.spooled(tight.message(str(n), BOTH)) for n in range(5)]
    files = {path: path.read_bytes() for path in writer.messages(tight.folder).iterdir()}
    place = writer.backlog(tight.folder, OLD.name)
    async with tight.importing((NEW, OLD)):
        await until(lambda: tight.backlog(OLD.name) == made)
        await until(lambda: tight.names() == [])
    # Killed before the files were gone: they are in both places; and by now the other takes its copies as well.
    for path in files:
        os.link(place / path.name, path)
    tight.delivered(OLD.name)
    for message_id in made[:3]:
        tight.settle(message_id)
    monkeypatch.setattr(importer, "_FORGET_AFTER", -1)
    async with tight.importing((NEW, OLD)):
        await until(lambda: not writer.summary(tight.folder).messages)
        await until(lambda: not tight.client.keys(keys.IMPORTED + "*"))
    assert sorted(tight.ledger.pending_ids(OLD.name)) == made
    assert sorted(tight.ledger.pending_ids()) == made[3:]


async def test_a_disk_without_hard_links(tight: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a copy of the file waits."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    message_id = await tight.spooled(tight.message(to=BOTH))
    async with tight.importing((NEW, OLD)):
        await until(lambda: tight.names() == [])
        assert tight.ledger.pending_ids() == tight.backlog(OLD.name) == [message_id]
        tight.delivered(OLD.name)
        await until(lambda: tight.ledger.pending_ids(OLD.name) == [message_id])


async def test_a_greylisting_backup_is_not_a_dead_one(tight: Place) -> None:
    """Copies that a backup has deferred do not keep its new ones out, but leave room to those that defer nothing."""
    tight.client.hset(keys.OWN + OLD.name, mapping={f"old{n}": CopyState().to_wire() for n in range(1000)})
    message_id = await tight.spooled(tight.message(to=BOTH))
    async with tight.importing((NEW, OLD)):
        await until(lambda: message_id in tight.ledger.pending_ids(OLD.name))
        tight.settle(message_id)
        memory = tight.client.info("memory")
        tight.client.set("ballast", bytes(int(0.79 * memory["maxmemory"] - memory["used_memory"])))
        another = await tight.spooled(_sized(tight, 500 << 10, BOTH))
        await until(lambda: another in tight.ledger.pending_ids())
        assert tight.backlog(OLD.name) == [another]


async def test_the_clock_starts_at_acceptance(place: Place) -> None:
    """Retries and ages count from when the client heard 2xx, however long the message was in the spool."""
    accepted = changes.now(place.client) - 86400
    message = place.message()
    old = Message(message.envelope._replace(received_at=accepted), message.body)
    spooled = await place.spooled(old)
    late = place.message("late", ids=IdSource())
    place.stage(late)
    note = Released(late.envelope.id, ("new",), accepted_at=accepted)
    place.put(f"{late.envelope.id}.release", json.dumps(note._asdict()).encode())
    await place.imported()
    for message_id in (spooled, late.envelope.id):
        assert place.client.zscore(keys.PENDING + "new", message_id) == pytest.approx(accepted, abs=0.01)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that the log was told of."""
    names: list[str] = []

    def notice(_level: str, _text: str, **fields: object) -> None:
        names.append(Path(str(fields.get("file", fields.get("folder", "")))).name)

    monkeypatch.setattr("relay.maillog.notice", notice)
    monkeypatch.setattr("relay.maillog.spool_trouble", lambda name, _error: names.append(name))
    return names


STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@as_root
async def test_what_another_user_puts_there_is_left_alone(place: Place, told: list[str]) -> None:
    """A spool open to everybody is closed; a stranger's mail, notes, links and pipes are neither read nor moved."""
    theirs = [place.abandoned("ready", "theirs"), place.abandoned("release"), place.abandoned("held")]
    note = IdSource().next()
    place.put(f"{note}.discard", b"{}")
    place.put("README", b"no file of ours")
    kept = place.names()
    for name in kept:
        os.chown(writer.messages(place.folder) / name, STRANGER, STRANGER)
    pipe = writer.messages(place.folder) / f"{IdSource().next()}-10.ready"
    os.mkfifo(pipe)
    link = writer.messages(place.folder) / f"{IdSource().next()}-10.ready"
    link.symlink_to("/etc/passwd")
    owner = place.folder / "owners" / IdSource().owner
    os.mkfifo(owner)
    staged = place.message("staged in Redis", ids=IdSource())
    place.stage(staged)
    shadow = place.put(f"{staged.envelope.id}-10.ready", b"0123456789")
    os.chown(shadow, STRANGER, STRANGER)
    kept = place.names()
    for folder in (place.folder, writer.messages(place.folder)):
        folder.chmod(0o777)
    ours = await place.spooled(place.message("ours"))
    for _ in range(2):
        await place.imported()
    assert place.ledger.pending_ids() == [ours]
    assert place.staged() == [staged.envelope.id]
    assert not set(place.uncertain()) & set(theirs)
    assert place.names() == kept
    assert place.corrupt() == []
    assert {folder.stat().st_mode & 0o777 for folder in (place.folder, writer.messages(place.folder))} == {0o700}
    assert {"spool", "messages", *kept} <= set(told)


@as_root
@pytest.mark.parametrize("name", ["importer.lock", "identity", "destinations.json"])
async def test_a_file_of_another_user_names_nothing(place: Place, told: list[str], name: str) -> None:
    """Neither the importer's lock nor what the spool remembers is believed when it is somebody else's."""
    (place.folder / name).write_text('{"evil": "x"}')
    os.chown(place.folder / name, STRANGER, STRANGER)
    await place.spooled(place.message())
    async with place.importing() as under_test:
        await until(lambda: bool(told) or under_test.passes > 0)
    assert not place.client.hexists(keys.DESTINATIONS, "evil")
    assert told


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "broken"), PermissionError(errno.EACCES, "no"), RuntimeError("?")]
)
@pytest.mark.parametrize("head", ["ready", "release", "tmp", "held"])
async def test_a_file_that_gives_trouble_stops_nothing(
    place: Place, told: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception, head: str
) -> None:
    """Whatever one file's trouble is, what is behind it comes in; it is told once and is there for another time."""
    bad = place.abandoned(head, "bad") if head != "release" else IdSource().next()
    if head == "release":
        place.put(f"{bad}.release", b"{}")
    (bad_name,) = place.names()
    made = [await place.spooled(place.message(str(n))) for n in range(5)]
    read, rename = private_files.read, Path.rename

    def failing_read(where: Path, name: str, size: int | None = None) -> bytes:
        if name == bad_name:
            raise error
        return read(where, name, size)

    def failing_rename(path: Path, target: Path) -> Path:
        if path.name == bad_name and isinstance(error, OSError):
            raise error
        return rename(path, target)

    monkeypatch.setattr(private_files, "read", failing_read)
    monkeypatch.setattr(Path, "rename", failing_rename)
    async with place.importing() as under_test:
        await until(lambda: under_test.passes > 3)
    if head == "tmp" and not isinstance(error, OSError):
        return
    assert place.ledger.pending_ids() == made
    assert place.names() == [bad_name]
    assert told.count(bad_name) == 1


async def test_junk_in_notes_and_in_what_was_brought_in(place: Place, told: list[str]) -> None:
    """A note that makes no sense is set aside, a member of Redis's that is no note is struck; the rest goes on."""
    junk = [b"[]", b"null", b'{"id": 1}', b'{"id":"%s","destinations":[1],"digest":"","recipients":[]}', b"[" * 10000]
    for data in junk:
        message_id = IdSource().next()
        place.put(f"{message_id}.release", data.replace(b"%s", message_id.encode()))
    good = place.message("good", ids=IdSource())
    place.stage(good)
    released = Released(good.envelope.id, ("new",), "", ("b@test",), 0.0)
    place.put(f"{good.envelope.id}.release", json.dumps(released._asdict()).encode())
    await place.imported()
    imported = keys.IMPORTED + (place.folder / "identity").read_text()
    place.client.zadd(imported, {b"\xff\xfe": 1, b"../../x new": 1, b"x" * 100: 1, b"": 1})
    await place.imported()
    assert place.client.zcard(imported) == 0
    assert place.ledger.pending_ids() == [good.envelope.id]
    assert len(place.corrupt()) == len(junk)


async def test_a_failed_body_is_delivered_again_from_a_copy_in_the_spool(place: Place) -> None:
    """The way back for a body on disk that Redis has lost, as docs/failures.md has it."""
    message = place.message("kept")
    record = message.pack()
    place.put(f"{message.envelope.id}-{len(record)}.ready", record)
    await place.imported()
    assert place.ledger.pending_ids() == [message.envelope.id]


async def test_a_file_that_comes_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool restored from yesterday's backup, or moved: its messages are delivered, as ones that may repeat."""
    told: list[tuple[str, str]] = []
    monkeypatch.setattr("relay.maillog.repeated", lambda message_id, name, _reason: told.append((message_id, name)))
    yesterday = place.message("yesterday", ids=IdSource(lambda: time.time() - 86400.0))
    record = yesterday.pack()
    place.put(f"{yesterday.envelope.id}-{len(record)}.ready", record)
    fresh = await place.spooled(place.message("fresh"))
    await place.imported()
    assert set(place.ledger.pending_ids()) == {yesterday.envelope.id, fresh}
    assert told == [(yesterday.envelope.id, "new")]
