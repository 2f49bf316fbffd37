"""DNS messages (RFC 1035 4): a question in wire form, and what an answer says. Nothing here does I/O.

An answer is data of a stranger. Whatever is wrong with it raises BadAnswer: it is cut off, a name points forward or
round in circles, it has another number or answers another question.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import NamedTuple

A, CNAME, SOA, MX, AAAA = 1, 5, 6, 15, 28
NO_ERROR, NO_SUCH_NAME = 0, 3
_IN = 1
_HEAD = struct.Struct("!6H")
_RECORD = struct.Struct("!HHIH")
_IS_ANSWER, _IS_CUT, _ASK_OTHERS, _OPCODE, _CODE = 0x8000, 0x0200, 0x0100, 0x7800, 0x000F
_MOST_RECORDS = 500
_LABEL = re.compile(rb"[A-Za-z0-9_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?")
_NO_HOST = "?"  # stands for a label that no host name has


class BadAnswer(ValueError):
    """It is no answer to the question."""


class DnsRecord(NamedTuple):
    """One record of the answer: ``text`` is an address or a host name in lower case without the last dot."""

    name: str
    kind: int
    ttl: int
    text: str
    preference: int = 0  # of an MX


class DnsAnswer(NamedTuple):
    """What a server says: its code, whether the rest did not fit, the records, and for how long there is no other."""

    code: int
    is_cut: bool
    records: list[DnsRecord]
    negative_ttl: int | None = None  # by the SOA (RFC 2308 5)


def is_host_name(name: str) -> bool:
    """Return whether a host can have this name."""
    return 0 < len(name) <= 253 and all(
        len(label) < 64 and _LABEL.fullmatch(label) for label in name.encode("ascii", "replace").split(b".")
    )


def question(number: int, name: str, kind: int) -> bytes:
    """Return a question for a name without the last dot. Raises ValueError if it is none that a host can have."""
    if not is_host_name(name):
        raise ValueError("no host name")
    labels = b"".join(bytes([len(label)]) + label for label in name.encode("ascii").split(b"."))
    return _HEAD.pack(number, _ASK_OTHERS, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, _IN)


def read(data: bytes, number: int, name: str, kind: int) -> DnsAnswer:
    """Read an answer to the question. Raises BadAnswer."""
    try:
        return _read(data, number, name.lower(), kind)
    except (struct.error, IndexError) as error:
        raise BadAnswer("it is cut off") from error


def _read(data: bytes, number: int, name: str, kind: int) -> DnsAnswer:
    found, flags, questions, answers, authorities, _ = _HEAD.unpack_from(data)
    if found != number or not flags & _IS_ANSWER or flags & _OPCODE:
        raise BadAnswer("it has another number")
    if questions != 1:
        raise BadAnswer("it answers another question")
    asked, at = _name(data, _HEAD.size)
    if (asked, *struct.unpack_from("!HH", data, at)) != (name, kind, _IN):
        raise BadAnswer("it answers another question")
    at += 4
    code, is_cut = flags & _CODE, bool(flags & _IS_CUT)
    if is_cut:  # what there is of it may end anywhere
        return DnsAnswer(code, is_cut, [])
    if answers + authorities > _MOST_RECORDS:
        raise BadAnswer("it has too many records")
    records: list[DnsRecord] = []
    negative_ttl = None
    for index in range(answers + authorities):
        record, of_soa, at = _record(data, at)
        if index < answers and record is not None:
            records.append(record)
        elif index >= answers and of_soa is not None:
            negative_ttl = of_soa
    return DnsAnswer(code, is_cut, records, negative_ttl)


def _record(data: bytes, at: int) -> tuple[DnsRecord | None, int | None, int]:
    """Return a record, if it is of use here, the time that a SOA gives to negative answers, and where the next is."""
    name, at = _name(data, at)
    kind, kind_of_net, ttl, length = _RECORD.unpack_from(data, at)
    at += _RECORD.size
    end = at + length
    if end > len(data):
        raise BadAnswer("it is cut off")
    ttl = ttl if ttl < 1 << 31 else 0  # RFC 2181 8
    if kind_of_net != _IN:
        return None, None, end
    if kind in {A, AAAA}:
        if length != (4 if kind == A else 16):
            raise BadAnswer("an address of another length")
        return DnsRecord(name, kind, ttl, str(ipaddress.ip_address(data[at:end]))), None, end
    if kind == CNAME:
        return DnsRecord(name, kind, ttl, _within(data, at, end)), None, end
    if kind == MX:
        (preference,) = struct.unpack_from("!H", data, at)
        return DnsRecord(name, kind, ttl, _within(data, at + 2, end), preference), None, end
    if kind == SOA and length >= 20:
        (least,) = struct.unpack_from("!I", data, end - 4)
        return None, min(ttl, least), end
    return None, None, end


def _within(data: bytes, at: int, end: int) -> str:
    name, after = _name(data, at)
    if after != end:
        raise BadAnswer("a name of another length")
    return name


def _name(data: bytes, at: int) -> tuple[str, int]:
    """Return the name that begins here, and where what follows it begins. A pointer may only point backwards."""
    labels: list[str] = []
    octets, after, floor = 0, -1, at
    while True:
        length = data[at]
        if length >= 0xC0:
            target = (length & 0x3F) << 8 | data[at + 1]
            if after < 0:
                after = at + 2
            if target >= floor:
                raise BadAnswer("a name points forward, or round in circles")
            at = floor = target
            continue
        if length > 63:
            raise BadAnswer("a label of an unknown kind")
        at += 1
        if not length:
            return ".".join(labels), at if after < 0 else after
        label = data[at : at + length]
        at += length
        octets += length + 1
        if octets > 254 or len(label) < length:
            raise BadAnswer("a name that is too long")
        labels.append(label.decode("ascii").lower() if _LABEL.fullmatch(label) else _NO_HOST)
