"""Nothing that a client sends as a body can end it early, here or behind us, however it is cut up."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.smtpd.end_of_data import EndOfData, EndOfLines
from relay.smtpd.line_endings import LineEnds, LongestLine, Stuffing

# What can go wrong is about these few octets.
BODIES = st.lists(st.sampled_from([b"\r", b"\n", b".", b"x", b"\0", b"\r\n", b"..", b"\r\n.\r\n", b"MAIL"])).map(
    b"".join
)
CUTS = st.lists(st.integers(0, 200))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def by_data(data: bytes, cuts: list[int], *, refuse: bool = False) -> tuple[bytes, bool, bytes]:
    """Return what leaves of a body, whether it was refused, and what came behind its end (None: it has not come)."""
    finder, ends = EndOfData(), LineEnds(refuse=refuse, stuffed=True)
    out, rest = b"", b""
    for piece in pieces(data, cuts):
        if finder.found:
            rest += piece
        else:
            out += ends.feed(finder.feed(piece))
            rest = finder.rest
    out += ends.finish() if finder.found else b""
    return (b"" if ends.refused else out), ends.refused, (rest if finder.found else b"-")


def by_bdat(data: bytes, cuts: list[int], *, refuse: bool = False) -> tuple[bytes, bool]:
    ends, stuffing = LineEnds(refuse=refuse, stuffed=False), Stuffing()
    out = b"".join(stuffing.feed(ends.feed(piece)) for piece in pieces(data, cuts))
    out += stuffing.feed(ends.finish())
    return (b"" if ends.refused else out), ends.refused


def has_bare(data: bytes) -> bool:
    return re.search(rb"\r(?!\n)|(?<!\r)\n", data) is not None


@given(BODIES, CUTS, st.booleans())
def test_data_leaves_whole_and_unchanged_by_packets(body: bytes, cuts: list[int], refuse: bool) -> None:
    """A body ends at the first CRLF.CRLF; what leaves has no other and no bare CR or LF, however it came."""
    data = body + b"\r\n.\r\nREST"
    out, refused, rest = by_data(data, [], refuse=refuse)
    end = (b"\r\n" + data).index(b"\r\n.\r\n")
    sent = data[:end]  # with the CRLF in front of the dot, but for an empty message
    assert by_data(data, cuts, refuse=refuse) == (out, refused, rest)
    assert rest == (b"\r\n" + data)[end + 5 :]
    assert refused == (refuse and has_bare(sent))
    if not refused:
        assert b"\r\n.\r\n" not in b"\r\n" + out
        assert not has_bare(out)
        assert out.endswith(b"\r\n") or not out
        if not has_bare(sent):
            assert out == sent


@given(BODIES, CUTS, st.booleans())
def test_chunks_leave_stuffed_and_unchanged_by_packets(body: bytes, cuts: list[int], refuse: bool) -> None:
    """What came by BDAT leaves in the wire form of DATA: stuffed, ended by CRLF; unstuffed it is what came."""
    out, refused = by_bdat(body, [], refuse=refuse)
    assert by_bdat(body, cuts, refuse=refuse) == (out, refused)
    assert refused == (refuse and has_bare(body))
    if not refused:
        assert b"\r\n.\r\n" not in b"\r\n" + out
        assert not has_bare(out)
        if not has_bare(body):
            whole = body if not body or body.endswith(b"\r\n") else body + b"\r\n"
            assert re.sub(rb"(?:\A|(?<=\r\n))\.", b"", out) == whole


@given(st.lists(st.sampled_from([b"x", b"x", b"x", b"\r\n"])), CUTS, st.integers(1, 12))
def test_longest_line(tokens: list[bytes], cuts: list[int], limit: int) -> None:
    """A line's length does not depend on packets."""
    lines = LongestLine(limit)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    found = [lines.exceeds(b"".join(tokens[a:b])) for a, b in itertools.pairwise(edges)]
    assert any(found) == any(len(part) > limit for part in b"".join(tokens).split(b"\r\n"))


@pytest.mark.parametrize("unit", [b"\r", b"\n", b".", b"\r.", b"\n.", b"\r\r\n", b"\r\n.\r\r\n", b".\r"])
def test_no_body_is_slow(unit: bytes) -> None:
    """A megabyte of the worst octets, in packets of any size, takes no more than a blink."""
    body = unit * ((1 << 20) // len(unit))
    for size in (1, 7, 1460, 65536):
        part = body[: size * 20_000]
        begun = time.process_time()
        finder, ends = EndOfData(), LineEnds(refuse=False, stuffed=True)
        for start in range(0, len(part), size):
            ends.feed(finder.feed(part[start : start + size]))
        assert time.process_time() - begun < 5


@given(
    st.lists(st.sampled_from([b"\r", b"\n", b".", b"\r\n", b"x", b"..", b"\n.", b"\r" * 9]), max_size=30).map(b"".join),
    st.lists(st.integers(1, 8), min_size=1, max_size=40),
)
def test_ends_of_lines_do_not_depend_on_the_cut(body: bytes, cuts: list[int]) -> None:
    """A client that ends lines with LF has the same message and the same rest however its octets come."""
    data = body + b"\n.\r\nNOOP\r\n"
    whole = EndOfLines()
    expected = whole.feed(data)
    assert whole.found
    finder, got, at = EndOfLines(), b"", 0
    for size in itertools.cycle(cuts):
        got += finder.feed(data[at : at + size])
        at += size
        if finder.found:
            break
    assert (got, finder.rest + data[at:]) == (expected, whole.rest)
    assert (b"\r\n" + expected).replace(b"\r\n", b"").count(b"\n") == 0
    assert b"\r\n.\r\n" not in b"\r\n" + expected
