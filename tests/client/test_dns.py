"""The DNS client: what an answer may be, what it must not be, and that every look-up ends in time."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path

import dns.message
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relay.client.dns import NoAnswer, look_up, servers_of_system
from relay.client.dns_message import AAAA, MX, A, BadAnswer, question, read
from support.dns_server import DnsServer
from support.event_loops import both_loops
from support.waiting import free_port

Make = Callable[..., DnsServer]
ZONE = (
    "example.com 300 MX 20 mx2.example.com.",
    "example.com 300 MX 10 mx1.example.com.",
    "mx1.example.com 60 A 192.0.2.1",
    "mx1.example.com 60 AAAA 2001:db8::1",
    "mx2.example.com 60 A 192.0.2.2",
    "alias.example.com 30 CNAME example.com.",
    "round.example.com 30 CNAME about.example.com.",
    "about.example.com 30 CNAME round.example.com.",
    "far.example.com 30 CNAME nowhere.example.net.",
)


def texts(found: object) -> list[tuple[int, str]]:
    return sorted((record.preference, record.text) for record in found.records)


@both_loops
async def test_records_are_found(dns_server: Make) -> None:
    """By name and by alias, with the shortest time of all that led there; what is not there is said to be not there."""
    server = dns_server(*ZONE)
    where = [(server.host, server.port)]
    found = await look_up("example.com", MX, where, 10)
    assert (texts(found), found.ttl) == ([(10, "mx1.example.com"), (20, "mx2.example.com")], 300)
    assert texts(await look_up("mx1.example.com", A, where, 10)) == [(0, "192.0.2.1")]
    assert texts(await look_up("mx1.example.com", AAAA, where, 10)) == [(0, "2001:db8::1")]
    found = await look_up("alias.example.com", MX, where, 10)
    assert (texts(found), found.ttl) == ([(10, "mx1.example.com"), (20, "mx2.example.com")], 30)
    none = await look_up("mx2.example.com", AAAA, where, 10)
    assert (none.records, none.exists) == ([], True)
    none = await look_up("other.example.com", MX, where, 10)
    assert (none.records, none.exists) == ([], False)
    assert (await look_up("round.example.com", MX, where, 10)).records == []
    assert (await look_up("far.example.com", A, where, 10)).records == []


@both_loops
async def test_what_does_not_fit_is_fetched_by_tcp(dns_server: Make) -> None:
    server = dns_server(*ZONE, *(f"big.example.com 60 MX {n} host-{n}.example.com." for n in range(200)))
    server.is_cut = True
    found = await look_up("big.example.com", MX, [(server.host, server.port)], 10)
    assert len(found.records) == 200
    assert [by for by, _, _ in server.asked] == ["udp", "tcp"]


@both_loops
async def test_the_next_server_is_asked(dns_server: Make) -> None:
    """Where one is silent, refuses, cannot tell, or is not there; and where none can tell, that is said in time."""
    good, bad = dns_server(*ZONE), dns_server()
    servers = [(bad.host, bad.port), (good.host, good.port)]
    for rcode in ("SERVFAIL", "REFUSED", "NOTIMP", "FORMERR"):
        bad.rcode = rcode
        assert (await look_up("example.com", MX, servers, 10)).records
    bad.is_silent = True
    assert (await look_up("example.com", MX, servers, 4)).records
    nobody = ("127.0.0.1", free_port())
    assert (await look_up("example.com", MX, [nobody, servers[1]], 10)).records
    for those in ([servers[0]], [nobody], [servers[0], nobody]):
        begun = time.monotonic()
        with pytest.raises(NoAnswer):
            await look_up("example.com", MX, those, 0.4)
        assert time.monotonic() - begun < 10


def _other_number(packet: bytes, _: dns.message.Message) -> list[bytes]:
    return [struct.pack("!H", struct.unpack("!H", packet[:2])[0] ^ 1) + packet[2:], packet]


def _other_question(packet: bytes, asked: dns.message.Message) -> list[bytes]:
    other = dns.message.make_response(dns.message.make_query("evil.example", "MX", id=asked.id))
    return [other.to_wire(), packet]


def _question(packet: bytes, asked: dns.message.Message) -> list[bytes]:
    return [asked.to_wire(), b"", packet[:5], packet]


@both_loops
@pytest.mark.parametrize("spoil", [_other_number, _other_question, _question], ids=lambda f: f.__name__)
async def test_what_is_no_answer_does_not_count(dns_server: Make, spoil: Callable[..., list[bytes]]) -> None:
    """A forged packet that comes before the true one neither counts nor ends the wait for that."""
    server = dns_server(*ZONE)
    server.spoil = spoil
    assert texts(await look_up("mx1.example.com", A, [(server.host, server.port)], 10)) == [(0, "192.0.2.1")]


@both_loops
async def test_a_look_up_that_is_cancelled_leaves_nothing(dns_server: Make) -> None:
    server = dns_server()
    server.is_silent = True
    task = asyncio.ensure_future(look_up("example.com", MX, [(server.host, server.port)], 60))
    while not server.asked:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- messages ---------------------------------------------------------------------------------------------------------

HEAD = struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0)
ASKED = b"\7example\3com\0" + struct.pack("!HH", MX, 1)


def _record(name: bytes, data: bytes, kind: int = MX, length: int | None = None) -> bytes:
    return name + struct.pack("!HHIH", kind, 1, 60, len(data) if length is None else length) + data


FAULTS = {
    "nothing": b"",
    "half a head": HEAD[:5],
    "no question": struct.pack("!6H", 7, 0x8180, 0, 0, 0, 0),
    "a question without an end": HEAD + ASKED[:6],
    "fewer records than it says": HEAD + ASKED,
    "a pointer to itself": HEAD + ASKED + _record(b"\xc0\x1d", b"\0\x0a\xc0\x0c"),
    "a pointer forward": HEAD + ASKED + _record(b"\xc0\xff", b"\0\x0a\xc0\x0c"),
    "pointers in a circle": HEAD + ASKED + _record(b"\xc0\x0c", b"\0\x0a\1a\xc0\x2b"),
    "a name that is too long": HEAD + ASKED + _record(b"\xc0\x0c", b"\0\x0a" + (b"\x3f" + b"a" * 63) * 5 + b"\0"),
    "a label of a kind unknown": HEAD + ASKED + _record(b"\xc0\x0c", b"\0\x0a\x80a\0"),
    "data beyond the end": HEAD + ASKED + _record(b"\xc0\x0c", b"\0\x0a\0", length=60000),
    "more data than the name takes": HEAD + ASKED + _record(b"\xc0\x0c", b"\0\x0a\1a\0xx"),
    "an address of five octets": HEAD + ASKED + _record(b"\xc0\x0c", b"12345", kind=A),
    "too many records": struct.pack("!6H", 7, 0x8180, 1, 65535, 0, 0) + ASKED,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_refused(fault: str) -> None:
    with pytest.raises(BadAnswer):
        read(FAULTS[fault], 7, "example.com", MX)


@given(st.binary(max_size=200))
@example(b"\xc0\x0c" * 50)
def test_whatever_comes_is_an_answer_or_bad(junk: bytes) -> None:
    """Never another exception, never an endless loop."""
    for data in (junk, HEAD + junk, HEAD + ASKED + junk, struct.pack("!6H", 7, 0x8180, 1, 3, 3, 3) + ASKED + junk):
        try:
            read(data, 7, "example.com", MX)
        except BadAnswer:
            continue


@given(st.data())
def test_a_true_answer_with_some_octets_changed(data: st.DataObject) -> None:
    server = DnsServer(*ZONE)
    packet = bytearray(server.answer(question(7, "alias.example.com", MX), "udp")[0])
    server._loop.close()
    for _ in range(data.draw(st.integers(0, 4))):
        packet[data.draw(st.integers(0, len(packet) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(packet[: data.draw(st.integers(0, len(packet)))]), 7, "alias.example.com", MX)
    except BadAnswer:
        return


@pytest.mark.parametrize("name", ["", ".", "a..b", "-a.example", "a" * 64, "a b.example", "ex\nample", "é.example"])
def test_only_host_names_are_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="no host name"):
        question(1, name, MX)


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("# no servers\n", [("127.0.0.1", 53)]),
        ("nameserver 192.0.2.53\n", [("192.0.2.53", 53)]),
        (
            "search example\nnameserver ::1\noptions edns0\nnameserver fe80::1%eth0 # x\nnameserver",
            [("::1", 53), ("fe80::1%eth0", 53)],
        ),
        ("".join(f"nameserver 192.0.2.{n}\n" for n in range(9)), [(f"192.0.2.{n}", 53) for n in range(3)]),
    ],
)
def test_servers_of_the_system(text: str, servers: list[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text(text)
    assert servers_of_system(tmp_path / "resolv.conf") == servers
    assert servers_of_system(tmp_path / "missing") == [("127.0.0.1", 53)]
