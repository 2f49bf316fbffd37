"""The stored record of a message: compressed where that pays, read back as it was, also out of a view."""

from __future__ import annotations

import base64
import os

import pytest

from relay.mail.envelope import Envelope
from relay.mail.recipient import Recipient
from relay.mail.record import Message

LARGE = 1_000_000
TEXT = b"All work and no play makes Jack a dull boy.\r\n" * (LARGE // 45)
ENCODED = base64.encodebytes(os.urandom(LARGE * 3 // 4)).replace(b"\n", b"\r\n")


def _message(body: bytes) -> Message:
    return Message(Envelope("0123456789abcdef", "a@test", (Recipient("b@test"),), 1.0, len(body)), body)


@pytest.mark.parametrize(
    ("body", "most"),
    [
        (TEXT, 0.1),
        (TEXT[: 45 * 40], 0.3),
        # One large attachment with a letter in front, and a letter with a small one behind.
        (TEXT[: 45 * 1000] + ENCODED, 1.1),
        (TEXT + ENCODED[: 78 * 600], 0.2),
    ],
)
def test_what_shrinks_is_stored_small(body: bytes, most: float) -> None:
    """Text takes a fraction of its room, wherever in the message it is."""
    message = _message(body)
    record = message.pack()
    assert len(record) < most * len(body) + 500
    assert Message.unpack(record, message.envelope.id) == message


def test_a_large_attachment_is_stored_as_it_is() -> None:
    """What compression makes little of is neither compressed nor copied."""
    message = _message(ENCODED)
    assert message.packed()[-1] is message.body
    assert b"".join(message.packed()) == message.pack()


@pytest.mark.parametrize("body", [TEXT, ENCODED, b"short\r\n", b""])
def test_a_view_of_a_record_is_as_good(body: bytes) -> None:
    """A worker reads the record where Redis's reply has left it."""
    message = _message(body)
    found = Message.unpack(memoryview(message.pack()), message.envelope.id)  # as good
    assert found.envelope == message.envelope
    assert bytes(found.body) == body
