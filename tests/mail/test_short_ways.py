"""What is written out for speed says the same as the plain way does."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relay.mail import headers
from relay.mail.ids import ALPHABET, IdSource, is_id, made_at, owner_of
from relay.mail.reply import Reply, wire
from relay.mail.stored import to_json

_texts = st.text(st.characters(min_codepoint=0, max_codepoint=0x1FFFF))  # halves of characters among them
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(_texts, inner),
    max_leaves=20,
)
_pieces = st.sampled_from([
    b"Message-ID:", b"message-id:", b"MESSAGE-Id: ", b"X-Message-ID:", b"Received:",
    b"received: by relay.test (smtp-dup) ",
    b"by RELAY.test (smtp-dup) with", b"Subject: x", b"<1@x>", b"\r\n", b"\r\n ", b"\t", b"\x0b", b"\n", b":",
    b"\r\n\r\n",
])  # fmt: skip
_blocks = st.lists(_pieces, max_size=14).map(b"".join)


@given(_values)
def test_json_is_that_of_the_library(value: Any) -> None:
    assert to_json(value) == json.dumps(value, separators=(",", ":"))


@given(_blocks)
def test_the_message_id_is_the_first_that_a_search_finds(body: bytes) -> None:
    start = headers.name_of(body).start
    found = re.search(rb"(?mi)^message-id:[ \t\r\n]*(\S+)", headers.header_block(body, start))
    assert headers.name_of(body).message_id == (found[1] if found else b"")


@given(_blocks, st.integers(0, 3), st.integers(0, 3))
def test_hops_are_counted_line_by_line(block: bytes, most_hops: int, most_own: int) -> None:
    """A hop is a Received line with what is folded below it; it is ours if that names this relay."""
    fields = re.findall(rb"(?is)(?:\A|\r\n)(received:(?:(?!\r\n).|\r\n[ \t])*)", block)
    own = sum(b"by relay.test (smtp-dup) " in field.lower() for field in fields)
    assert headers.has_looped(block, "relay.test", most_hops, most_own) == (len(fields) > most_hops or own > most_own)


@given(st.lists(st.integers(0, (1 << 45) // 1000 - 1), min_size=1, max_size=5))
def test_an_id_says_when_and_by_whom_it_was_made(seconds: list[int]) -> None:
    """Whatever the clock does, ids grow, and have the form of one."""
    clock = iter(seconds)
    source = IdSource(lambda: float(next(clock)))
    made = [source.next() for _ in seconds]
    assert made == sorted(set(made))
    assert all(is_id(one) and owner_of(one) == source.owner and set(one) <= set(ALPHABET) for one in made)
    assert int(made_at(made[0]) * 1000) == seconds[0] * 1000


@given(st.integers(200, 599), st.lists(_texts, min_size=1, max_size=3))
def test_equal_replies_are_the_same_octets(code: int, lines: list[str]) -> None:
    """A reply that came before is not written anew; each line has its code, and none is longer than 512 octets."""
    octets = wire(Reply(code, tuple(lines)))
    assert octets == wire(Reply(code, tuple(lines)))
    found = octets.split(b"\r\n")
    assert len(found) == len(lines) + 1
    assert all(len(line) <= 510 and line[:3] == b"%d" % code for line in found[:-1])
    assert [line[3:4] for line in found[:-1]] == [b"-"] * (len(lines) - 1) + [b" "]
