"""A DNS client: asks the servers of /etc/resolv.conf, or one that is named, by UDP, and by TCP what does not fit.

Each question goes to one server after the other until one knows, and all of it has a deadline. What comes in reply is
read with suspicion (dns_message): it counts only if it comes from the server that was asked, with the number and the
question of ours; anything else is as if nothing had come. Where no server knows, NoAnswer is raised. Nothing blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from relay.client.dns_message import CNAME, NO_ERROR, NO_SUCH_NAME, BadAnswer, DnsAnswer, DnsRecord, question, read

RESOLV_CONF = Path("/etc/resolv.conf")
PORT = 53
_ROUNDS = 2  # in which all servers are asked
_LONGEST_TRY = 5.0  # seconds for one server in one round
_MOST_SERVERS = 3
_MOST_ALIASES = 8
_LONGEST_NEGATIVE = 300  # seconds that a "there is none" counts, at most
_SHORT_NEGATIVE = 30  # where the answer says nothing about that

Server = tuple[str, int]


class NoAnswer(Exception):
    """No server has given an answer: they are silent, or say that they cannot tell."""


class LookUp(NamedTuple):
    """The records of a name, [] where it has none of the kind, and for how many seconds that counts."""

    records: list[DnsRecord]
    ttl: int
    exists: bool = True  # the name, with whatever records


def servers_of_system(path: Path = RESOLV_CONF) -> list[Server]:
    """Return the servers that resolv.conf names; as the C library, the local one where it names none."""
    found: list[Server] = []
    with contextlib.suppress(OSError):
        for line in path.read_text("utf-8", "replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                found.append((words[1], PORT))
    return found[:_MOST_SERVERS] or [("127.0.0.1", PORT)]


async def look_up(name: str, kind: int, servers: Sequence[Server], seconds: float) -> LookUp:
    """Return the records of a name, by its aliases where it has some. Raises NoAnswer."""
    deadline = asyncio.get_running_loop().time() + seconds
    ttl, seen = 1 << 31, {name}
    while True:
        answer = await _ask(name, kind, servers, deadline)
        for _ in range(_MOST_ALIASES):
            records = [r for r in answer.records if r.name == name and r.kind == kind]
            alias = next((r for r in answer.records if r.name == name and r.kind == CNAME), None)
            if records or alias is None:
                break
            name, ttl = alias.text, min(ttl, alias.ttl)
        if records:
            return LookUp(records, min(ttl, *(r.ttl for r in records)))
        if name in seen:
            none = _SHORT_NEGATIVE if answer.negative_ttl is None else min(answer.negative_ttl, _LONGEST_NEGATIVE)
            return LookUp([], min(ttl, none), answer.code != NO_SUCH_NAME)
        seen.add(name)  # the answer ends with an alias of which it says nothing more
        if len(seen) > _MOST_ALIASES:
            raise NoAnswer("the name has too many aliases")


async def _ask(name: str, kind: int, servers: Sequence[Server], deadline: float) -> DnsAnswer:
    """Return the first answer that a server gives. Raises NoAnswer."""
    loop = asyncio.get_running_loop()
    share = max(0.0, deadline - loop.time()) / max(1, len(servers) * _ROUNDS)
    trouble = "no answer in time"
    for _ in range(_ROUNDS):
        for server in servers:
            left = min(deadline - loop.time(), max(share, min(1.0, deadline - loop.time())), _LONGEST_TRY)
            if left <= 0:
                break
            try:
                async with asyncio.timeout(left):
                    answer = await _ask_one(server, name, kind)
            except TimeoutError:
                trouble = "no answer in time"
            except (OSError, EOFError) as error:
                trouble = getattr(error, "strerror", None) or "no answer"
            except ValueError as error:  # BadAnswer among them
                trouble = str(error)
            else:
                if answer.code in {NO_ERROR, NO_SUCH_NAME}:
                    return answer
                trouble = f"the DNS server says {_CODES.get(answer.code, answer.code)}"
    raise NoAnswer(trouble)


_CODES = {1: "FORMERR", 2: "SERVFAIL", 4: "NOTIMP", 5: "REFUSED"}


async def _ask_one(server: Server, name: str, kind: int) -> DnsAnswer:
    """Ask one server. Raises OSError, EOFError, ValueError."""
    number = secrets.randbelow(1 << 16)
    packet = question(number, name, kind)
    answer: asyncio.Future[DnsAnswer] = asyncio.get_running_loop().create_future()
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Listener(answer, packet, number, name, kind), remote_addr=server
    )
    try:
        found = await answer
    finally:
        transport.close()
    return found if not found.is_cut else await _ask_by_tcp(server, packet, number, name, kind)


async def _ask_by_tcp(server: Server, packet: bytes, number: int, name: str, kind: int) -> DnsAnswer:
    reader, writer = await asyncio.open_connection(*server)
    try:
        writer.write(struct.pack("!H", len(packet)) + packet)
        (size,) = struct.unpack("!H", await reader.readexactly(2))
        found = read(await reader.readexactly(size), number, name, kind)
    finally:
        writer.transport.abort()
    if found.is_cut:
        raise BadAnswer("it is cut off even by TCP")
    return found


class _Listener(asyncio.DatagramProtocol):
    """A socket of one question: its port is random, and the kernel drops what comes from elsewhere."""

    def __init__(self, answer: asyncio.Future[DnsAnswer], packet: bytes, number: int, name: str, kind: int) -> None:
        self._answer = answer
        self._packet = packet
        self._asked = (number, name, kind)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the question."""
        cast("asyncio.DatagramTransport", transport).sendto(self._packet)

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Take the answer; what is none may be forged, so the true one is still waited for."""
        if self._answer.done():
            return
        try:
            self._answer.set_result(read(data, *self._asked))
        except BadAnswer:
            return

    def error_received(self, exc: Exception) -> None:
        """Note that nobody listens there."""
        if not self._answer.done():
            self._answer.set_exception(exc)
