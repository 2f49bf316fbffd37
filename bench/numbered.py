"""Numbered mail: what message ``n`` is, for whom, who refuses it for good, and one digest of its envelope and octets.

The source sends it, the servers record it, the audit knows it: all three from here, so that an audit needs nobody's
word. A number with a seed makes the same message every time. ``varied`` is what a soak sends: 8-bit text, SMTPUTF8,
the null sender, folded and odd header fields, dots to be stuffed, and some that is large.
"""

from __future__ import annotations

import hashlib
import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pydoc_data import topics

from bench import content

_LARGE = 0.004
_LINES = [b"%06d the quick brown fox jumps over the lazy dog and never looks back\r\n" % n for n in range(1000)]
_NOISE = random.Random(0).randbytes(300_000).hex().encode()
_NO_LINE_ENDS = bytes(c if c not in b"\r\n\0" else 255 for c in range(256))
_VARIANTS = 500
_EIGHT_BIT = (
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich\r\n".encode() + b"\xff\xfe\x80 no UTF-8\r\n"
)
_PLAIN, _UTF8 = b"soak.example", "söak.example".encode()
_STUFFED = re.compile(rb"(?m)^\.")  # of a body whose lines all end with CRLF


@dataclass(frozen=True, slots=True)
class Mail:
    """One message: ``wire`` is its octets as DATA carries them, without the dot that ends it."""

    sender: bytes
    recipients: tuple[bytes, ...]
    parameters: tuple[bytes, ...]
    wire: bytes
    is_chunked: bool = False  # its source sends it with BDAT, where that is offered

    @property
    def digest(self) -> str:
        return digest(self.sender, self.parameters, self.wire)

    @property
    def unstuffed(self) -> bytes:
        """The octets that BDAT carries."""
        return _STUFFED.sub(b"", self.wire)


def digest(sender: bytes, parameters: Iterable[bytes], wire: bytes) -> str:
    """Return what two messages have in common only when sender, parameters, header fields and body are the same."""
    made = hashlib.sha256()
    for part in (sender, b" ".join(sorted(parameters)), wire):
        made.update(b"%d:" % len(part) + part)
    return made.hexdigest()


def is_refused(number: int, index: int) -> bool:
    """Say whether a server that refuses some for good refuses this recipient, at RCPT or at the dot."""
    return refuses_message(number) or refuses_recipient(number, index)


def refuses_recipient(number: int, index: int) -> bool:
    return zlib.crc32(b"%d.%d" % (number, index)) % 40 == 0


def refuses_message(number: int) -> bool:
    return zlib.crc32(b"message %d" % number) % 70 == 0


def mixed(number: int, _size: int) -> tuple[bytes, int]:
    """Return a text of any size, with dots to be stuffed, and how many recipients it has."""
    source = random.Random(number)
    if source.random() < _LARGE:
        size = source.randrange(200_000, 600_000)
        body = b"".join(_NOISE[i : i + 76] + b"\r\n" for i in range(0, size, 76))
    else:
        lines = source.choice((4, 14, 28, 55, 160))
        start = source.randrange(len(_LINES) - lines)
        body = b"".join((b"..dot %d\r\n" % number, *_LINES[start : start + lines]))
    return body, source.choice((1, 1, 1, 2, 3))


@lru_cache(maxsize=1)
def _prose() -> list[bytes]:
    """Return some 10,000 lines of English: Python's own reference, which comes with every Python."""
    lines = "\n".join(topics.topics.values()).encode("ascii", "replace").splitlines()
    return [line.strip() + b"\r\n" for line in lines if not line.strip().startswith(b".")]


def text(number: int, size: int) -> tuple[bytes, int]:
    """Return ordinary text."""
    lines = _prose()
    start = random.Random(number).randrange(len(lines))
    found: list[bytes] = []
    left = size
    while left > 0:
        found.append(lines[(start + len(found)) % len(lines)])
        left -= len(found[-1])
    return b"".join(found), 1


@lru_cache(maxsize=_VARIANTS)
def _mail(variant: int, size: int) -> bytes:
    return content.wire(size, seed=variant)


def mail(number: int, size: int) -> tuple[bytes, int]:
    """Return the mail of the other benchmarks: half words, half base64."""
    return _mail(number % _VARIANTS, size), 1


def noise(number: int, size: int) -> tuple[bytes, int]:
    """Return what does not compress: 8-bit octets in lines."""
    octets = random.Random(number).randbytes(size).translate(_NO_LINE_ENDS)
    return b"".join(b" " + octets[i : i + 900] + b"\r\n" for i in range(0, size - size // 300 - 3, 900)), 1


KINDS = {"mixed": mixed, "text": text, "mail": mail, "noise": noise, "varied": mixed}


def message(number: int, kind: str, size: int) -> tuple[bytes, int]:
    """Return the message of a number in wire form without its dot, and how many recipients it has."""
    made = compose(number, kind, size)
    return made.wire, len(made.recipients)


def compose(number: int, kind: str = "varied", size: int = 4096) -> Mail:
    """Return the message of a number."""
    body, count = KINDS[kind](number, size)
    head = b"Subject: %d\r\nMessage-ID: <%d@soak.example>\r\n" % (number, number)
    sender, domain, chunked = b"sender@soak.example", _PLAIN, False
    parameters: tuple[bytes, ...] = ()
    if kind == "varied":
        source = random.Random(-1 - number)
        chance = source.random()
        sender = b"" if chance < 0.05 else b"sender%d@soak.example" % (number % 7)
        head += b"X-Folded: one\r\n\ttwo \r\n  three\r\nX-Odd:no space; trailing \r\nX-Odd: %d\r\n" % number
        if chance > 0.8:
            parameters, body = (b"BODY=8BITMIME",), body + _EIGHT_BIT
        if chance > 0.9:
            parameters = (*parameters, b"SMTPUTF8")
            sender, domain = f"sënder{number % 7}@söak.example".encode(), _UTF8
            head += "X-Ünsaid: grüße\r\n".encode()
        chunked = source.random() < 0.25
    addresses = tuple(b"n%d.%d@%s" % (number, i, domain) for i in range(count))
    wire = b"%sX-Checksum: %08x\r\n\r\n%s" % (head, zlib.crc32(body), body)
    return Mail(sender, addresses, parameters, wire, chunked)
