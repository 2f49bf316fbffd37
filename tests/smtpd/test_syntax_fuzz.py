"""Whatever stands in a command, a PROXY header or a body: it is read in one way, or refused by a rule."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import socket
import struct

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from relay.mail.esmtp import MAIL_EXTENSIONS, RCPT_EXTENSIONS, command_line
from relay.smtpd.end_of_data import EndOfData
from relay.smtpd.proxy_protocol import BadHeader, Origin, read_header
from relay.smtpd.syntax import SyntaxProblem, carried, check, declared_size, parse_chunk, parse_path
from relay.smtpd.xclient import XCLIENT, XFORWARD, BadAttribute, read_attributes

FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")), deadline=None, suppress_health_check=list(HealthCheck)
)
ALL = {*MAIL_EXTENSIONS.values(), *RCPT_EXTENSIONS.values()}

# What a session lets through to the parsers: any octets but control characters, as text.
WORDS = [*'<>"\\@ :,=+%a', "  ", "<>", "FROM:", "TO:", "b.example", "[IPv6:::1]", "\u00e9", "\u00a0", "\u2028", "12"]
WORDS += ["SIZE=", "BODY=8BITMIME", "SMTPUTF8", "RET=HDRS", "ENVID=", "NOTIFY=NEVER", "ORCPT=rfc822;", "AUTH=<>"]
WORDS += ["MT-PRIORITY=-3", "HOLDFOR=", "ADDR=", "PORT=", "HELO=", "+0D", "IPv6:"]
OCTETS = st.binary(max_size=4).map(lambda b: re.sub(rb"[\x00-\x1f\x7f]", b"", b).decode("utf-8", "surrogateescape"))
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=5)
COMMAND = st.lists(st.one_of(st.sampled_from(WORDS), TEXT, OCTETS), max_size=15).map(
    lambda words: "".join(words).encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
)


def assert_by_rule(problem: SyntaxProblem) -> None:
    assert re.match(r"501 5\.5\.4|555 5\.5\.4|550 5\.7\.30", problem.reply.text)


@FUZZ
@example(keyword="FROM", rest='"')
@example(keyword="TO", rest='"> SIZE=1"@b')
@example(keyword="TO", rest='a"b SIZE=1')
@given(keyword=st.sampled_from(["FROM", "TO"]), rest=COMMAND)
def test_paths_and_parameters(keyword: str, rest: str) -> None:
    """What is read goes on as one command, which reads the same again; what is not is 501, 555 or 550."""
    known = MAIL_EXTENSIONS if keyword == "FROM" else RCPT_EXTENSIONS
    try:
        address, parameters = parse_path(f"{keyword}:{rest}".strip(" "), keyword)
        check(parameters, known, ALL)
        assert 0 <= declared_size(parameters) < 10**20
    except SyntaxProblem as problem:
        assert_by_rule(problem)
        return
    command = command_line(
        f"{'MAIL' if keyword == 'FROM' else 'RCPT'} {keyword}",
        address,
        carried(parameters, known, dict.fromkeys(ALL, "")),
    )
    assert not re.search(rb"[\x00-\x1f\x7f]", command)
    again = command.decode("utf-8", "surrogateescape").partition(" ")[2]
    assert parse_path(again, keyword) == (address, parameters)
    # A server that looks for the first ">" outside quotes finds the same end of the path.
    outside = re.sub(r'"(?:[^"\\]|\\.)*"', lambda quoted: "q" * len(quoted[0]), again)
    assert outside.index(">") == len(keyword) + 2 + len(address)


@FUZZ
@example(argument="\u00a012")
@example(argument="3 la\u017ft")
@given(argument=COMMAND)
def test_chunk_sizes(argument: str) -> None:
    """BDAT has a size of at most 20 ASCII digits and perhaps LAST, or is 501."""
    try:
        size, is_last = parse_chunk(argument)
    except SyntaxProblem as problem:
        assert_by_rule(problem)
        return
    assert re.fullmatch(r" *[0-9]{1,20}( +LAST)? *", argument, re.IGNORECASE)
    assert size == int(argument.split(maxsplit=1)[0])
    assert is_last == argument.upper().rstrip().endswith("LAST")


@FUZZ
@given(words=COMMAND, known=st.sampled_from([XFORWARD, XCLIENT]))
@example(words="NAME=+C2+85", known=XFORWARD)
@example(words="HELO=+E2+80+AE", known=XFORWARD)
@example(words="PORT=\u0663", known=XFORWARD)
@example(words="ADDR=fe80::1%eth0", known=XFORWARD)
def test_attributes(words: str, known: tuple[str, ...]) -> None:
    """Attributes are printable, addresses and ports are such, or the whole is refused."""
    with contextlib.suppress(BadAttribute):
        for name, value in read_attributes(words, known).items():
            assert name in known
            assert value.isprintable()
            assert len(value) <= 255
            if name.endswith("PORT") and value:
                assert 0 <= int(value) <= 65535
                assert value.isascii()
            if name.endswith("ADDR") and value:
                socket.inet_pton(socket.AF_INET6 if ":" in value else socket.AF_INET, value)


# The PROXY protocol

ADDRESS4 = st.ip_addresses(v=4)
ADDRESS6 = st.ip_addresses(v=6)
PORT = st.integers(0, 65535)
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, payload: bytes, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, size) + payload


def v1_header(family: bytes, source: object, target: object, port: int) -> bytes:
    return b"PROXY %b %b %b %d 25\r\n" % (family, str(source).encode(), str(target).encode(), port)


def v2_header(family: int, source: bytes, target: bytes, port: int) -> bytes:
    return v2(1, family, source + target + struct.pack("!HH", port, 25))


TRUE_HEADERS = st.one_of(
    st.tuples(ADDRESS4, ADDRESS4, PORT).map(lambda a: (v1_header(b"TCP4", *a), a[0], a[2])),
    st.tuples(ADDRESS6, ADDRESS6, PORT).map(lambda a: (v1_header(b"TCP6", *a), a[0], a[2])),
    st.tuples(ADDRESS4, ADDRESS4, PORT).map(lambda a: (v2_header(0x11, a[0].packed, a[1].packed, a[2]), a[0], a[2])),
    st.tuples(ADDRESS6, ADDRESS6, PORT).map(lambda a: (v2_header(0x21, a[0].packed, a[1].packed, a[2]), a[0], a[2])),
)
V1_WORDS = [b"PROXY", b" ", b"TCP4", b"TCP6", b"UNKNOWN", b"192.0.2.1", b"::1", b"fe80::1%eth0", b"25", b"65536", b"-1"]
V1_WORDS += [b"\r", b"\n", b"\r\n", b"\xff", b"EHLO x"]
FAMILIES = st.sampled_from([0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32])
RUBBISH = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from(V1_WORDS), max_size=12).map(lambda words: b"PROXY " + b"".join(words)),
    st.tuples(st.integers(0, 1), FAMILIES, st.binary(max_size=250)).map(lambda h: v2(*h)),
    st.tuples(st.integers(0, 15), FAMILIES, st.binary(max_size=80), st.integers(0, 65535)).map(lambda h: v2(*h)),
)


async def read_in_pieces(data: bytes, cuts: list[int]) -> tuple[Origin | None, bytes]:
    reader = asyncio.StreamReader()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        asyncio.get_running_loop().call_soon(reader.feed_data, data[start:end])
    asyncio.get_running_loop().call_soon(reader.feed_eof)
    origin = await asyncio.wait_for(read_header(reader), 5)
    return origin, await reader.read()


@FUZZ
@given(header=TRUE_HEADERS, rest=st.binary(max_size=50), cuts=st.lists(st.integers(0, 120), max_size=4))
def test_true_proxy_headers(header: tuple, rest: bytes, cuts: list[int]) -> None:
    """A true header is read however it comes in pieces, and not an octet more."""
    octets, address, port = header
    origin, left = asyncio.run(read_in_pieces(octets + rest, cuts))
    mapped = getattr(address, "ipv4_mapped", None)
    assert origin == Origin(str(mapped or address), port)
    assert left == rest


@FUZZ
@given(data=RUBBISH, cuts=st.lists(st.integers(0, 300), max_size=4))
def test_rubbish_for_a_proxy_header(data: bytes, cuts: list[int]) -> None:
    """Anything else is nobody, or a BadHeader: nothing else is raised, and nothing hangs."""
    with contextlib.suppress(BadHeader):
        origin, _ = asyncio.run(read_in_pieces(data, cuts))
        if origin is not None:
            socket.inet_pton(socket.AF_INET6 if ":" in origin.address else socket.AF_INET, origin.address)
            assert 0 <= origin.port <= 65535


# The end of data

BODY = st.lists(st.sampled_from([b"x", b".", b"\r", b"\n", b"\r\n", b"\r\n.", b".\r\n", b"\0"]), max_size=30).map(
    b"".join
)


@FUZZ
@given(data=BODY, cuts=st.lists(st.integers(0, 60), max_size=20))
def test_end_of_data(data: bytes, cuts: list[int]) -> None:
    """The first CRLF.CRLF ends it, the CRLF of the DATA line counted, wherever the packets end; all else is there."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    finder, body, rest = EndOfData(), b"", b""
    for start, end in itertools.pairwise(edges):
        if finder.found:
            rest += data[start:end]
        else:
            body += finder.feed(data[start:end])
            rest = finder.rest
    end = (b"\r\n" + data).find(b"\r\n.\r\n")
    assert finder.found == (end >= 0)
    if finder.found:
        assert body == data[:end]
        assert rest == data[end + 3 :]
    else:
        assert data.startswith(body)
        assert len(data) - len(body) <= 2
