"""A stored record that is damaged is never sent: whatever octet changed, was lost or was added, wherever it lay."""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard

from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.ids import are_ids, is_destination_name, is_id
from relay.mail.recipient import Recipient
from relay.mail.record import BodyElsewhere, Message, bound

ID = "0123456789abcdef"
SHORT = b"Subject: hello\r\n\r\n..dots\r\ntext\r\n"
TEXT = b"Subject: long\r\n\r\n" + b"All work and no play makes Jack a dull boy.\r\n" * 40
NOISE = b"Subject: noise\r\n\r\n" + os.urandom(300_000).hex().encode() + b"\r\n"


def message(body: bytes, message_id: str = ID, **fields: object) -> Message:
    values = {"recipients": (Recipient("b@test", ("ORCPT=rfc822;b@test",)),), "destinations": ("new",), **fields}
    return Message(Envelope(message_id, "a@test", received_at=1.5, size=len(body), **values), body)


def old(sent: Message) -> bytes:
    """Return the record as version 0.1.0 stored it, without a checksum and not compressed."""
    head = sent.envelope.to_json()
    return struct.pack("!BBI", 1, 0, len(head)) + head + sent.body


def spoilt(record: bytes) -> Iterator[bytes]:
    """Yield the record with every octet changed in some ways, cut at every length, and with something behind it."""
    for at, octet in enumerate(record):
        for other in {octet ^ (1 << bit) for bit in range(8)} | {0, 0xFF, 0x20} - {octet}:
            yield record[:at] + bytes([other]) + record[at + 1 :]
        yield record[:at]
        yield record[:at] + record[at + 1 :]
    for more in (b"\0", b"\0" * 100, b"\r\n", b".\r\n", record):
        yield record + more


@pytest.mark.parametrize("body", [SHORT, TEXT, b""])
def test_no_octet_of_a_record_can_change(body: bytes) -> None:
    """Nothing of a small record, plain or compressed, can change without being seen, nor of its envelope alone."""
    sent = message(body)
    record = sent.pack()
    assert Message.unpack(record, ID) == sent
    for bad in spoilt(record):
        with pytest.raises(MalformedRecord):
            Message.unpack(bad, ID)
        with contextlib.suppress(MalformedRecord):  # what its envelope says is true, or not said
            assert Message.unpack_envelope(bad, ID) == sent.envelope


def test_no_octet_of_a_large_record_can_change() -> None:
    """Nor of a large one: octets here and there, blocks of zeros, and sectors that changed places."""
    record = message(NOISE).pack()
    chance = random.Random(7)
    for _ in range(200):
        at = chance.randrange(len(record))
        bad = bytearray(record)
        bad[at] ^= 1 << chance.randrange(8)
        with pytest.raises(MalformedRecord):
            Message.unpack(bytes(bad), ID)
    for size in (1, 512, 4096):
        for _ in range(20):
            at = chance.randrange(0, len(record) - 2 * size)
            for block in (bytes(size), record[at + size : at + 2 * size]):
                bad = bytearray(record)
                bad[at : at + size] = block
                with pytest.raises(MalformedRecord):
                    Message.unpack(bytes(bad), ID)


@pytest.mark.parametrize("body", [SHORT, TEXT])
def test_no_octet_of_a_stub_can_change(body: bytes) -> None:
    """What says that the body is elsewhere is checked as well."""
    record = Message.stub(message(body).pack(), "host", f"/var/lib/smtp-dup/failed/{ID}")
    with pytest.raises(BodyElsewhere):
        Message.unpack(record, ID)
    assert Message.unpack_envelope(record, ID) == message(body).envelope
    for bad in spoilt(record):
        with pytest.raises(MalformedRecord):
            Message.unpack(bad, ID)
    with pytest.raises(MalformedRecord, match=ID):
        Message.unpack(record, "0" * 16)


def test_what_was_stored_before_stays_readable() -> None:
    """A record without a checksum is read as ever, and a stub of it is one with."""
    sent = message(SHORT)
    assert Message.unpack(old(sent), ID) == sent
    assert Message.unpack_envelope(old(sent), ID) == sent.envelope
    with pytest.raises(BodyElsewhere):
        Message.unpack(Message.stub(old(sent), "host", "/path"), ID)


def test_an_older_version_reads_what_is_stored_now() -> None:
    """Workers may be updated after relays: the layout is the one they know, with a key in the envelope they do not."""
    sent = message(SHORT)
    version, flags, length = struct.unpack_from("!BBI", sent.pack())
    assert (version, flags & 3) == (1, 0)
    assert Envelope.from_json(sent.pack()[6 : 6 + length]) == sent.envelope
    assert sent.pack()[6 + length :] == SHORT


@pytest.mark.parametrize("make", [Message.pack, old], ids=["now", "before"])
@pytest.mark.parametrize(
    "body",
    [
        b"no line end",
        b"Subject: a\r\n\r\ntext\r",
        b"Subject: a\r\n\r\ntext\n",
        b"Subject: a\r\n\r\ntext\r\n\0\0\0\0",
        b".\r\n",
        b".\r\nMAIL FROM:<x@test>\r\n",
        b"Subject: a\r\n\r\n.\r\nMAIL FROM:<x@test>\r\n",
        b"Subject: a\r\n\r\nx\n.\r\nMAIL FROM:<x@test>\r\n",
        b"Subject: a\r\n\r\nx\n.\nMAIL FROM:<x@test>\r\n",
        b"Subject: a\r\n\r\nx\r\n.\nMAIL FROM:<x@test>\r\n",
        b"Subject: a\r\n\r\n" + b"x" * 2000 + b"\r\n.\r\n",
    ],
)
def test_a_body_is_one_message(make, body: bytes) -> None:
    """What would end its transaction early, or never, is no body, whatever its checksum says."""
    record = make(message(body))
    for stored in (record, memoryview(record)):
        with pytest.raises(MalformedRecord, match="its body"):
            Message.unpack(stored, ID)  # a view is as good


def test_a_record_is_good_under_its_own_name_only() -> None:
    """An intact record in another's place is not that other's message."""
    for record in (message(SHORT).pack(), old(message(SHORT))):
        with pytest.raises(MalformedRecord, match=f"the record of {ID}"):
            Message.unpack(record, "0" * 16)
        with pytest.raises(MalformedRecord, match=f"the record of {ID}"):
            Message.unpack_envelope(record, "0" * 16)


def forged(head: bytes, body: bytes = SHORT, flags: int = 0) -> bytes:
    return struct.pack("!BBI", 1, flags, len(head)) + head + body


@pytest.mark.parametrize(
    "change",
    [
        (b'"a@test"', b"5"),
        (b'"a@test"', b'"a@test>\\r\\nRCPT TO:<x@test"'),
        (b'"b@test"', b'"b@test>\\nRCPT TO:<x@test"'),
        (b'"b@test"', b"null"),
        (b'[["b@test","ORCPT=rfc822;b@test"]]', b'"b@test"'),
        (b'[["b@test","ORCPT=rfc822;b@test"]]', b'{"b@test":1}'),
        (b'"ORCPT=rfc822;b@test"', b"[1]"),
        (b'"ORCPT=rfc822;b@test"', b'"A=B\\u0000"'),
        (b"1.5", b'"1.5"'),
        (b"1.5", b"NaN"),
        (b"1.5", b"Infinity"),
        (b'["new"]', b'"new"'),
        (b'["new"]', b'["../../etc"]'),
        (b'["new"]', b'["a b"]'),
        (b'["new"]', b"[" * 100_000),
        (b'"size":32', b'"size":32.0'),
        (b'"size":32', b'"size":true'),
        (b'"size":32', b'"size":-33'),
        (ID.encode(), b"../../../etc/pas"),
    ],
)
def test_an_envelope_has_the_types_that_it_should(change: tuple[bytes, bytes]) -> None:
    """An envelope that anybody could have written is an error of the record, never of who reads it."""
    head = message(SHORT).envelope.to_json()
    bad = head.replace(*change)
    assert bad != head
    for name in (ID, "../../../etc/pas"):
        with pytest.raises(MalformedRecord):
            Message.unpack(forged(bad), name)
        with pytest.raises(MalformedRecord):
            Message.unpack_envelope(forged(bad), name)


def bomb(size: int, *, announced: bool) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=announced)
    if announced:
        return compressor.compress(bytes(size))
    stream = compressor.compressobj()
    return b"".join((*(stream.compress(bytes(1 << 20)) for _ in range(size >> 20)), stream.flush()))


@pytest.mark.parametrize("announced", [True, False])
def test_a_small_record_does_not_unfold_to_a_large_one(announced: bool) -> None:
    """No more is made of a compressed body than its envelope says, and no envelope may say more than is ever taken."""
    data = bomb(256 << 20, announced=announced)
    assert len(data) < 64 << 10
    for size in (100, 256 << 20):
        head = message(SHORT).envelope.to_json().replace(b'"size":32', b'"size":%d' % size)
        tracemalloc.start()
        try:
            with pytest.raises(MalformedRecord):
                Message.unpack(forged(head, data, flags=1), ID)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_what_may_be_taken_unfolds() -> None:
    """A message as large as smtp.max_message_bytes allows is read, however small it was stored."""
    body = b"x" * 998 + b"\r\n"
    sent = message(body * ((70 << 20) // 1000))
    record = sent.pack()
    with pytest.raises(MalformedRecord, match=r"smtp\.max_message_bytes"):
        Message.unpack(record, ID)
    for octets in (70 << 20, 0):
        bound(octets)
        assert Message.unpack(record, ID) == sent


def test_names() -> None:
    """Only what has the form of an id or a name is one."""
    assert is_id(ID)
    for other in ("", ID + "0", ID[:15], "../../etc/passwd", ID[:15] + "u", ID[:15] + "\n", ID.upper(), 5, None, ["a"]):
        assert not is_id(other)
        assert not are_ids([other])
        assert not are_ids([ID, other])
    assert are_ids([ID, ID])
    assert are_ids([])
    for values in (None, ID, {ID: 1}, (ID,), [ID + "," + ID], [f"{ID},{ID[:8]}", ID[:7]], [[ID]]):
        assert not are_ids(values)
    assert is_destination_name("[::1]:25")
    for other in ("", "a/b", "a\n", "x" * 101, "\x1b[2J", 5, None):
        assert not is_destination_name(other)


@pytest.mark.parametrize("text", ["a\tb@test", "a\x1b[2J@test", "a\x7f@test", "a\rb@test", "\ud800@test"])
@pytest.mark.parametrize("where", ["from", "to", "rcpt", "mail"])
def test_what_no_command_can_say_is_no_envelope(text: str, where: str) -> None:
    """A record that would be an error at each try, before a server has seen it, is malformed: it fails and says why."""
    record = {"id": "0123456789abcdef", "from": "a@test", "to": [["b@test"]], "at": 1.0, "size": 0}
    changes: dict[str, dict[str, object]] = {
        "from": {"from": text},
        "to": {"to": [[text]]},
        "rcpt": {"to": [["b@test", text]]},
        "mail": {"mail": [text]},
    }
    with pytest.raises(MalformedRecord):
        Envelope.from_json(json.dumps({**record, **changes[where]}).encode())
