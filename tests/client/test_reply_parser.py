"""Replies are read right however their octets arrive, and nothing else passes for a reply."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.client.reply_parser import ReplyParser, safe_text
from relay.mail.reply import Reply

texts = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cn", "Co", "Cf", "Zs")), max_size=40)
replies = st.builds(Reply, st.integers(200, 599), st.lists(texts, min_size=1, max_size=5).map(tuple))


@given(st.lists(replies, max_size=6), st.lists(st.integers(1, 30), min_size=1), st.sampled_from([b"\r\n", b"\n"]))
def test_any_packets_give_the_same_replies(expected: list[Reply], cuts: list[int], end: bytes):
    """However the stream is cut, the replies are those that were sent, in order."""
    stream = b"".join(
        b"".join(
            b"%d%s%s%s" % (r.code, b"-" if n < len(r.lines) - 1 else b" ", line.encode(), end)
            for n, line in enumerate(r.lines)
        )
        for r in expected
    )
    parser, got, position, turn = ReplyParser(), [], 0, 0
    while position < len(stream):
        step = cuts[turn % len(cuts)]
        parser.feed(stream[position : position + step], got.append)
        position, turn = position + step, turn + 1
    assert got == expected
    assert parser.is_between
    assert parser.finish() is None


def heard(packets: Iterable[bytes]) -> tuple[list[Reply], bool]:
    """What a parser makes of packets: the replies, and whether it gave up."""
    parser, got = ReplyParser(), []
    try:
        for packet in packets:
            parser.feed(packet, got.append)
        if (last := parser.finish()) is not None:
            got.append(last)
    except ValueError:
        return got, True
    return got, False


@given(
    st.builds(
        lambda code, mark, text, end: code + mark + text + end,
        st.sampled_from([b"250", b"421", b"099", b"25", b"2_0", "٢٥٠".encode()]),
        st.sampled_from([b" ", b"-", b"", b"  ", b"\r\n", b"_"]),
        st.one_of(
            st.binary(max_size=20),
            st.text(st.characters(max_codepoint=127), max_size=20).map(str.encode),
            st.integers(495, 520).map(lambda length: b"x" * length),
        ),
        st.sampled_from([b"\r\n", b"\n", b"\r", b"\r\r\n", b"", b"\r\n250 b\r\n"]),
    ),
    st.sampled_from([b"", b"250-a\r\n", b"2", b"250 a\r\n", b"250-"]),
)
def test_one_packet_is_read_as_its_octets_are(packet: bytes, before: bytes):
    """A whole reply in one packet, which is read the short way, gives what it gives octet by octet."""
    octets = [bytes([octet]) for octet in before + packet]
    assert heard([before, packet]) == heard(octets)


@given(st.binary(max_size=200), st.integers(1, 20))
def test_garbage_is_refused_or_read_and_nothing_else(garbage: bytes, step: int):
    """Whatever octets come, there is a reply of printable text or a ValueError."""
    parser, got = ReplyParser(), []
    try:
        for i in range(0, len(garbage), step):
            parser.feed(garbage[i : i + step], got.append)
        last = parser.finish()
    except ValueError:
        return
    for reply in [*got, *([last] if last else [])]:
        assert 0 <= reply.code <= 999
        assert all(line.isprintable() for line in reply.lines)


@pytest.mark.parametrize(
    "stream",
    [
        b"hello\r\n",
        b"25\r\n",
        b"2500 x\r\n",
        b"+50 x\r\n",
        b"2_5 x\r\n",
        b" 25 x\r\n",
        b"250_x\r\n",
        b"\r\n",
        b"250-a\r\n550 b\r\n",
        b"250-a\r\nb\r\n",
        "٢٥٠ x\r\n".encode(),
        b"250-x\r\n" * 101,
        b"250-" + b"x" * 40_000 + b"\r\n250-" + b"x" * 40_000 + b"\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_reply(stream: bytes):
    """Two codes in one reply, a code that is none, no end or no measure: refused."""
    with pytest.raises(ValueError, match=r"."):
        ReplyParser().feed(stream, print)


def test_an_endless_line_in_tiny_packets_is_refused():
    """The bound holds also for what comes octet by octet."""
    parser = ReplyParser()
    with pytest.raises(ValueError, match="without an end"):  # noqa: PT012 - any of them
        for _ in range(70_000):
            parser.feed(b"2", print)


@pytest.mark.parametrize(
    ("stream", "reply"),
    [
        (b"250-queued\r\n", Reply(250, ("queued",))),
        (b"250-queued", Reply(250, ("queued",))),
        (b"250-a\r\n250-b", Reply(250, ("a", "b"))),
        (b"250-a\r\n250", Reply(250, ("a", ""))),
        (b"250-a\r\n25", Reply(250, ("a",))),
        (b"250 2.0.0 queu", Reply(250, ("2.0.0 queu",))),
        (b"550", Reply(550, ("",))),
        (b"55", None),
        (b"", None),
    ],
)
def test_a_reply_broken_off_counts_by_its_code(stream: bytes, reply: Reply | None):
    """A stream that ends after a complete code has given that reply; before it, none."""
    assert heard([stream])[0] == ([reply] if reply else [])


def test_text_is_made_safe():
    """Valid UTF-8 stays, control characters and other octets are escaped, 512 octets with code and CRLF are kept."""
    assert safe_text("schöne Grüße 日本".encode()) == "schöne Grüße 日本"
    assert safe_text(b"caf\xe9 \x1b[31m\ra\x00") == "caf\\xe9 \\x1b[31m\\ra\\x00"
    assert len(safe_text(b"x" * 4000)) == 506
