"""Damaged stored messages are kept and never sent, and do not block the messages behind them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import redis

from relay.ledger import keys
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.spool import writer
from relay.spool.files import SpoolFiles
from relay.spool.writer import Entry
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.scripted_server import ScriptedServer
from workers.delivery.courier import Courier


def message(ids: IdSource, body: bytes = b"Subject: hello\r\n\r\n..dots\r\ntext\r\n") -> Message:
    envelope = Envelope(ids.next(), "a@test", (Recipient("b@test"),), 1.0, len(body), destinations=("new",))
    return Message(envelope, body)


def damage(record: bytes, seed: int) -> bytes:
    """Return a record with a bit flipped, its end lost, something behind it, or zeros in it."""
    chance = random.Random(seed)
    at = chance.randrange(len(record))
    return (
        record[:at] + bytes([record[at] ^ (1 << chance.randrange(8))]) + record[at + 1 :],
        record[:at],
        record + bytes(1 + at),
        record[:at] + bytes(len(record) - at) if any(record[at:]) else record + b"\0",
    )[seed % 4]


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    """Whatever has become of a spooled message, it is not loaded but kept as it is; its neighbours are loaded."""
    folder = tmp_path / "spool"
    shelf = SpoolFiles(folder)
    writer.prepare(folder)
    ids = IdSource()
    good, bad = [], {}
    for seed in range(100):
        record = message(ids).pack()
        for spoil in (False, True):
            sent = message(ids)
            record = sent.pack()
            name = f"{sent.envelope.id}-{len(record)}.ready"
            stored = damage(record, seed) if spoil else record
            if spoil:
                bad[name] = stored
            else:
                good.append(sent.envelope.id)
            (writer.messages(folder) / name).write_bytes(stored)
    loaded = shelf.load(list(shelf.survey().mail))
    assert [found.entry.id for found in loaded] == good
    assert {path.name: path.read_bytes() for path in (folder / "corrupt").iterdir()} == bad


def test_a_record_under_another_name_is_set_aside(tmp_path: Path) -> None:
    """An intact record in the file of another message is that message's no more than any other."""
    folder = tmp_path / "spool"
    shelf = SpoolFiles(folder)
    writer.prepare(folder)
    ids = IdSource()
    record = message(ids).pack()
    name = f"{ids.next()}-{len(record)}.ready"
    (writer.messages(folder) / name).write_bytes(record)
    assert not shelf.load([Entry(name[:16], name, "ready", len(record))])
    assert [path.name for path in (folder / "corrupt").iterdir()] == [name]


@pytest.mark.parametrize("large", [False, True])
async def test_a_damaged_record_in_redis_is_failed(
    redis_client: redis.Redis, redis_url: str, scripted: type[ScriptedServer], large: bool
) -> None:
    """It goes to the failed list with the reason, whole, and holds up nobody; the server sees none of it."""
    server = scripted()
    contents = Contents(redis_client, "new")
    contents.register(server.destination("new"))
    text = random.Random(3).randbytes(200_000).hex().encode() if large else b"text"
    body = b"Subject: hello\r\n\r\n%s\r\n" % text
    count = 4 if large else 40
    ids = [contents.pending(body=body) for _ in range(2 * count)]
    bad = ids[::2]
    other = redis_client.get(keys.MESSAGE + ids[-1])
    for seed, message_id in enumerate(bad):
        record = redis_client.get(keys.MESSAGE + message_id)
        redis_client.set(keys.MESSAGE + message_id, damage(record, seed) if seed else other)
    stored = {i: redis_client.get(keys.MESSAGE + i) for i in bad}
    courier = Courier(settings(), server.destination("new"), "worker", redis_url)
    await courier.start()
    await courier.deliver("job", ids)
    await courier.drain()
    assert len(server.messages) == count
    assert {m.body for m in server.messages} == {body}
    assert contents.pending_ids() == []
    rows = {copy.id: copy.reply for copy in listed_copies.failures(redis_client)}
    assert sorted(rows) == sorted(bad)
    assert all(reply.startswith("554 5.3.0") for reply in rows.values())
    assert {i: redis_client.get(keys.MESSAGE + i) for i in bad} == stored
