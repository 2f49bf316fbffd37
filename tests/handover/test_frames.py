"""What a relay and a worker say to each other over the socket is whole, bounded, and never trusted."""

from __future__ import annotations

import math
import random
import struct

import pytest

from relay.handover.frames import (
    LARGEST,
    BadFrame,
    HandedCopy,
    Hello,
    Limits,
    ledger_of,
    read_copies,
    read_hello,
    read_limits,
)
from relay.mail.ids import IdSource

_ids = IdSource()


def test_copies_in_any_pieces() -> None:
    """However the kernel cuts the stream, each copy comes once, in order."""
    copies = [HandedCopy(_ids.next(), 1.5 + n, 2.5, bytes([n]) * (n * 700)) for n in range(20)]
    stream = b"".join(copy.packed() for copy in copies)
    for seed in range(20):
        random.seed(seed)
        received, found, at = bytearray(), [], 0
        while at < len(stream):
            cut = at + random.randrange(1, 5000)
            received += stream[at:cut]
            at = cut
            found += read_copies(received)
        assert found == copies
        assert not received


@pytest.mark.parametrize(
    ("size", "name", "accepted_at"),
    [
        (LARGEST + 1, b"1m8gdxhs0zswg00v", 1.0),
        (1, b"../../../../../x", 1.0),
        (1, b"\xff" * 16, 1.0),
        (1, b"1m8gdxhs0zswg00v", math.nan),
        (1, b"1m8gdxhs0zswg00v", math.inf),
        (1, b"1m8gdxhs0zswg00v", -1.0),
    ],
)
def test_no_copy(size: int, name: bytes, accepted_at: float) -> None:
    """A size, an id or a time that cannot be is no copy, before anything of it is kept."""
    received = bytearray(struct.pack("!I16sdd", size, name, 1.0, accepted_at))
    with pytest.raises(BadFrame):
        list(read_copies(received))


def test_hello_and_limits() -> None:
    """The hello comes first, once; of the limits behind it the last counts."""
    hello = Hello("new.example:25", "host.new.example_25.17.1", ledger_of("redis://:secret@localhost"))
    received = bytearray(hello.packed()[:10])
    assert read_hello(received) is None
    received += hello.packed()[10:] + Limits(1, 2).packed() + Limits(3, 4).packed() + b"\0"
    assert read_hello(received) == hello
    assert read_limits(received) == Limits(3, 4)
    assert read_limits(received) is None
    assert "secret" not in hello.ledger


@pytest.mark.parametrize(
    "line",
    [
        b"x" * 2000,
        b"no JSON\n",
        b"[]\n",
        b'["new", "worker"]\n',
        b'["../new", "worker", "1"]\n',
        b'["new", "two words", "1"]\n',
        b'["new", "", "1"]\n',
        b'["new", 7, "1"]\n',
        b"[" * 900 + b"\n",
    ],
)
def test_no_hello(line: bytes) -> None:
    with pytest.raises(BadFrame):
        read_hello(bytearray(line))
