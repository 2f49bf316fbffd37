"""A DNS server on loopback, by UDP and TCP, with the records that a test gives it, and with what goes wrong there.

Its answers are made by dnspython, so that the relay's own reading of them is held against another's writing.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Self, TypeVar, cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from support import ended_loops
from support.waiting import PATIENCE

T = TypeVar("T")
# What becomes of an answer: returns the packets to send, of which there may be none.
Spoil = Callable[[bytes, dns.message.Message], Iterable[bytes]]


class DnsServer:
    """``records`` are lines: ``"example.com 60 MX 10 mx1.example.com."``. A name of which it has none is NXDOMAIN.

    ``rcode`` is said instead of an answer; ``spoil`` is told every UDP answer and its question; ``is_cut`` has UDP
    answers cut, so that they are fetched by TCP. ``asked`` are the questions, as (transport, name, kind).
    """

    def __init__(self, *records: str) -> None:
        self.records = list(records)
        self.rcode: str | None = None
        self.negative_ttl: int | None = None  # for how long "there is none" counts, where that is said
        self.spoil: Spoil | None = None
        self.is_cut = False
        self.is_silent = False
        self.asked: list[tuple[str, str, str]] = []
        self.host, self.port = "127.0.0.1", 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dns-server", daemon=True)
        self._server: asyncio.Server | None = None

    def start(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def stop(self) -> None:
        """End it."""
        if self._loop.is_closed():
            return
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def answer(self, question: bytes, by: str) -> list[bytes]:
        """Return the packets that answer a question."""
        asked = dns.message.from_wire(question)
        name, kind = asked.question[0].name, asked.question[0].rdtype
        self.asked.append((by, name.to_text(omit_final_dot=True), dns.rdatatype.to_text(kind)))
        if self.is_silent:
            return []
        found = dns.message.make_response(asked, recursion_available=True)
        if self.rcode:
            found.set_rcode(dns.rcode.from_text(self.rcode))
        elif not self._fill(found, name, kind):
            found.set_rcode(dns.rcode.NXDOMAIN)
        if not found.answer and self.negative_ttl is not None:
            soa = f"ns.example. root.example. 1 60 60 60 {self.negative_ttl}"
            found.authority.append(dns.rrset.from_text(name.parent(), self.negative_ttl, "IN", "SOA", soa))
        if by == "udp" and self.is_cut:
            found.flags |= dns.flags.TC
            found.answer.clear()
        packet = found.to_wire()
        return list(self.spoil(packet, asked)) if self.spoil and by == "udp" else [packet]

    def _fill(self, found: dns.message.Message, name: dns.name.Name, kind: int) -> bool:
        """Put in the records of a name, behind its aliases; returns whether there is such a name."""
        exists = False
        for _ in range(20):
            alias = None
            for line in self.records:
                owner, ttl, of, text = line.split(" ", 3)
                if dns.name.from_text(owner) != name:
                    continue
                exists = True
                if of == "CNAME":
                    alias = dns.name.from_text(text)
                if dns.rdatatype.from_text(of) in {kind, dns.rdatatype.CNAME}:
                    fresh = dns.rrset.from_text(owner + ".", int(ttl), "IN", of, text)
                    found.find_rrset(found.answer, fresh.name, fresh.rdclass, fresh.rdtype, create=True).update(fresh)
            if alias is None:
                break
            name = alias
        return exists

    # Inside

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        await self._loop.create_datagram_endpoint(lambda: _Udp(self), local_addr=(self.host, self.port))

    async def _close(self) -> None:
        assert self._server is not None
        await ended_loops.close(self._server)
        await ended_loops.end_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        for packet in self.answer(await reader.readexactly(size), "tcp"):
            writer.write(struct.pack("!H", len(packet)) + packet)
        writer.close()


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        assert self._transport is not None
        for packet in self._server.answer(data, "udp"):
            self._transport.sendto(packet, addr)
