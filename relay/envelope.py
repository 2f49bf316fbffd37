"""What crosses the seams: a Reply, an Envelope with its recipients, a Message record, a Destination.

All are frozen. A Message has a wire form (version 1, or 2 when it is sealed) that the ledger and the spool
share, so that a record moves between them byte for byte. A record that is damaged, makes no sense or could not be sent
as one message raises MalformedRecord, one whose key is not here its child LockedRecord; nothing here does I/O.

A record of version 1 ends its envelope with a checksum, and says so with a flag, so that neither is lost unseen: CRC-32
of the stored body, then of header and envelope with it. A version that knows of neither reads past both. What was
stored before there were checksums is read without. A sealed record is authentic or Forged.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import zstandard

import relay.text
from relay import sealing
from relay.ids import ALPHABET, is_destination_name, is_id

T = TypeVar("T")
printable = relay.text.printable  # where most look for it; relay.text is quicker to import

RECORD_VERSION = 1
SEALED_VERSION = 2
_HEADER = struct.Struct("!BBI")  # version, flags, octets up to the body: the envelope JSON, or what seals it
_FLAG_ZSTD = 1
_FLAG_ELSEWHERE = 2  # instead of the body: JSON of the host and the path of the file that has the whole record
_FLAG_CHECKED = 4  # the envelope ends with a checksum
_FLAGS = _FLAG_ZSTD | _FLAG_ELSEWHERE | _FLAG_CHECKED
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})([0-9a-f]{8})"\}')
_CHECKSUM_OCTETS = len(b',"crc":"0123456789abcdef"}')
_COMPRESS_FROM = 512  # bytes; below this zstd's frame eats what it saves
# A larger body is compressed only if samples of it shrink to this part. Base64 of what is compressed already (images,
# archives) goes to 3/4: less than it costs in processor time, twice, to have a quarter less to move.
_SAMPLE_FROM, _WORTH = 256 << 10, 0.7
_SAMPLES, _SAMPLE = 4, 16 << 10
_to_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one at every call
# A lone dot would end DATA. Where a bare CR or LF ends a line nothing of ours wrote it, but servers differ about that.
_LONE_DOT = re.compile(rb"\n\.[\r\n]")
_LONE_DOT_ANYHOW = re.compile(rb"\r\.[\r\n]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LINE_END = re.compile(r"[\x00\r\n]")
_NO_TEXTS = {"port", "connections", "soft_bounce", "domains"}  # fields of a destination
_UNFOLDS = 64 << 20  # octets that a compressed body may have in any case
_REPLY_LINE_LIMIT = 512  # RFC 5321 4.5.3.1.5


class _Codecs(threading.local):
    """zstd contexts, which are costly to make and belong to one thread each."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


_codecs = _Codecs()
_most = _UNFOLDS


def bound(octets: int) -> None:
    """Let a compressed body have this many octets, in this process: ``smtp.max_message_bytes``, 0 for any.

    Dots are stuffed and our line is in front: twice as many can be right. What may have been taken under a former
    limit is not refused while it is small enough to do no harm.
    """
    global _most  # noqa: PLW0603 - one for each process: what is stored passes through many hands
    _most = max(_UNFOLDS, 2 * octets) if octets else 0


class MalformedRecord(ValueError):
    """A stored message that this version cannot read; it is set aside, never dropped."""


class LockedRecord(MalformedRecord):
    """A stored message that is sealed with a key which is not here, as yet; it waits."""


class BodyElsewhere(Exception):
    """A stored message whose body has been moved to a file; ``host`` and ``path`` say where."""

    def __init__(self, host: str, path: str) -> None:
        super().__init__(f"the body is kept on host {host} in {path}")
        self.host = host
        self.path = path


class IdSource:
    """Makes message ids: 16 characters, ordered by time (ms), that name the process which made them.

    Characters 9 to 12 are the owner: 20 random bits for each relay process, so that what a dead process
    left staged can be found by its ids alone. The last three count within the process.
    """

    def __init__(self) -> None:
        self.owner = _base32(random.SystemRandom().getrandbits(20), 4)
        self._count = 0

    def next(self) -> str:
        self._count = (self._count + 1) & 0x7FFF
        return _base32(int(time.time() * 1000), 9) + self.owner + _base32(self._count, 3)


def owner_of(message_id: str) -> str:
    """Return the owner part of a message id."""
    return message_id[9:13]


def made_at(message_id: str) -> float:
    """Return when a message id was made, seconds since the epoch; infinity for what is no id of ours."""
    digits = [ALPHABET.find(character) for character in message_id[:9]]
    if len(message_id) != 16 or min(digits) < 0:
        return math.inf
    return sum(digit << shift for digit, shift in zip(digits, range(40, -1, -5), strict=True)) / 1000


def _base32(number: int, width: int) -> str:
    return "".join(ALPHABET[(number >> shift) & 31] for shift in range(5 * (width - 1), -1, -5))


class Reply(NamedTuple):
    """One SMTP reply: a code and its text lines without code and CRLF (RFC 5321 4.2)."""

    code: int
    lines: tuple[str, ...]

    @classmethod
    def of(cls, code: int, *lines: str) -> Reply:
        """Make a reply of our own."""
        return cls(code, lines or ("",))

    @property
    def is_positive(self) -> bool:
        return 200 <= self.code < 300

    @property
    def is_temporary(self) -> bool:
        """Everything that is neither 2xx, 354 nor 5xx: the unknown counts as temporary."""
        return not self.is_positive and not self.is_permanent and self.code != 354

    @property
    def is_permanent(self) -> bool:
        return 500 <= self.code < 600

    @property
    def text(self) -> str:
        """The reply on one line, code first, for logs and listings."""
        return printable(f"{self.code} {' '.join(self.lines)}".rstrip())

    @property
    def wire(self) -> bytes:
        """The reply as sent, each line printable and at most 512 octets with its CRLF."""
        if len(self.lines) == 1:
            (text,) = self.lines
            if text.isascii() and text.isprintable():
                return f"{self.code:03d} {text[: _REPLY_LINE_LIMIT - 6]}\r\n".encode("ascii")
        last = len(self.lines) - 1
        return b"".join(
            b"%03d%s" % (self.code, b" " if i == last else b"-")
            + printable(line).encode("utf-8", "backslashreplace")[: _REPLY_LINE_LIMIT - 6]
            + b"\r\n"
            for i, line in enumerate(self.lines)
        )


class Recipient(NamedTuple):
    """One accepted RCPT: the address without angle brackets, and its ESMTP parameters as they came."""

    address: str
    parameters: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        return self.address.rpartition("@")[2].lower()


@dataclass(frozen=True, slots=True)
class Envelope:
    """Who a message is from, for whom, and where it came from.

    Addresses are str with surrogateescape, so that bytes that are no UTF-8 survive; the null sender is "".
    ``received_at`` is seconds since the epoch. ``size`` counts the octets of the body in wire form.
    ``digest`` names equal mail ("" when there is no Message-ID); see the ledger's uncertain messages.
    """

    id: str
    sender: str
    recipients: tuple[Recipient, ...]
    received_at: float
    size: int
    parameters: tuple[str, ...] = ()  # of MAIL: BODY=8BITMIME, SMTPUTF8, RET=..., ENVID=...
    client_address: str = ""
    client_helo: str = ""
    digest: str = ""
    destinations: tuple[str, ...] = ()  # names of the backups that get a copy
    identity: tuple[tuple[str, str], ...] = ()  # XFORWARD attributes of the real client, to pass on
    # Which recipients a backup was promised, by index, where that is not all of them. None: an old record, without it.
    promised: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    def to_json(self) -> bytes:
        """Return the wire form, version 1."""
        record: dict[str, Any] = {
            "id": self.id,
            "from": self.sender,
            "to": [[r.address, *r.parameters] for r in self.recipients],
            "at": round(self.received_at, 3),
            "size": self.size,
        }
        optional = (
            ("mail", self.parameters),
            ("addr", self.client_address),
            ("helo", self.client_helo),
            ("digest", self.digest),
            ("dest", self.destinations),
            ("xf", self.identity),
        )
        record |= {key: value for key, value in optional if value}
        if self.promised is not None:
            record["for"] = dict(self.promised)
        return _to_json(record).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Envelope:
        """Read the wire form. Raises MalformedRecord."""
        try:
            record = json.loads(data)
            envelope = cls(
                id=record["id"],
                sender=_text(record["from"]),
                recipients=tuple(Recipient(_text(to[0]), _texts(to[1:])) for to in record["to"]),
                received_at=_number(record["at"]),
                size=record["size"],
                parameters=_texts(record.get("mail", [])),
                client_address=_any_text(record.get("addr", "")),
                client_helo=_any_text(record.get("helo", "")),
                digest=_any_text(record.get("digest", "")),
                destinations=_texts(record.get("dest", [])),
                identity=tuple((_any_text(name), _any_text(value)) for name, value in record.get("xf", [])),
                promised=_promised(record["for"], len(record["to"])) if "for" in record else None,
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise MalformedRecord(f"unreadable envelope: {printable(str(error))}") from error
        if not is_id(envelope.id) or type(envelope.size) is not int or envelope.size < 0:
            raise MalformedRecord("unreadable envelope: no id or no size")
        if not all(map(is_destination_name, envelope.destinations)):
            raise MalformedRecord("unreadable envelope: the name of a backup is none")
        return envelope

    def owed_to(self, destination: Destination) -> tuple[int, ...]:
        """Return the indices of the recipients that a destination was promised a copy for, at acceptance.

        Settings of today do not count: what was promised is kept whatever has become of them. Only an old record says
        nothing of it; then the filter of today stands for the one of then, and where it would leave nobody, everybody
        is owed: a copy too many beats a loss. A destination that the envelope does not name has copies that were moved
        to it, with a state of their own where not everybody is owed.
        """
        everybody = tuple(range(len(self.recipients)))
        if self.promised is None:
            return tuple(i for i in everybody if destination.wants(self.recipients[i])) or everybody
        return dict(self.promised).get(destination.name, everybody)

    @property
    def wants_smtputf8(self) -> bool:
        return "SMTPUTF8" in (p.upper() for p in self.parameters)


@dataclass(frozen=True, slots=True)
class Message:
    """An envelope and its body.

    ``body`` is the wire form: dot-stuffed, with our Received line in front, every line ended by CRLF,
    without the end-of-data line. It is written to a server as it is, followed by ``.CRLF``. A worker's may
    be a view of the record, which is good for writing it.
    """

    envelope: Envelope
    body: bytes

    def pack(self) -> bytes:
        """Return the stored record, the body compressed where that pays, sealed where there is a key."""
        return b"".join(self.packed())

    def packed(self) -> tuple[bytes, ...]:
        """Return the stored record in parts, of which the last may be the body itself: no copy of a large one."""
        head = self.envelope.to_json()
        body, flags = self.body, 0
        if _is_worth_compressing(body):
            small = _codecs.compressor.compress(body)
            if len(small) < len(body):
                body, flags = small, _FLAG_ZSTD
        if sealing.is_on():
            head, body = sealing.seal(self.envelope.id, flags, head, body)
            return _HEADER.pack(SEALED_VERSION, flags, len(head)) + head, body
        return _checked(flags, head, body), body

    @classmethod
    def stub(cls, record: bytes, host: str, path: str) -> bytes:
        """Return a stored record without its body, which has been moved. Raises MalformedRecord."""
        version, flags, start = cls._layout(record)
        head = bytes(record[_HEADER.size : start])
        where = json.dumps([host, path]).encode("ascii")
        if version == RECORD_VERSION:
            if flags & _FLAG_CHECKED:
                head = head[:-_CHECKSUM_OCTETS] + b"}"
            return _checked(_FLAG_ELSEWHERE, head, where) + where
        return b"".join((_HEADER.pack(version, _FLAG_ELSEWHERE, len(head)), head, where))

    @classmethod
    def unpack(cls, record: bytes, message_id: str) -> Message:
        """Read the stored record of a message. Raises MalformedRecord, LockedRecord, BodyElsewhere."""
        version, flags, start = cls._layout(record)
        head, body = bytes(record[_HEADER.size : start]), record[start:]  # it may be a view
        if flags & _FLAG_CHECKED and zlib.crc32(body) != _checksum_of_body(head):
            raise MalformedRecord("damaged: its body does not match its checksum")
        if flags & _FLAG_ELSEWHERE:
            if version == RECORD_VERSION:
                _own_envelope(head, message_id)
            raise cls._elsewhere(bytes(body))
        if version == SEALED_VERSION:
            opened, sealed = _opened(head, message_id), body
            head, body = opened.envelope, _authentic(lambda: opened.body(sealed, flags))
        envelope = _own_envelope(head, message_id)
        if flags & _FLAG_ZSTD:
            body = _unfolded(body, envelope.size)
        if len(body) != envelope.size:
            raise MalformedRecord(f"body has {len(body)} octets, its envelope says {envelope.size}")
        _check_wire_form(body, trusted=version == SEALED_VERSION or bool(flags & _FLAG_CHECKED))
        return cls(envelope, body)

    @classmethod
    def unpack_envelope(cls, record: bytes, message_id: str) -> Envelope:
        """Read only the envelope, which needs only the first part of the record. Raises as ``unpack`` does."""
        version, _, start = cls._layout(record)
        head = record[_HEADER.size : start]
        if version == SEALED_VERSION:
            head = _opened(head, message_id).envelope
        return _own_envelope(head, message_id)

    @staticmethod
    def _layout(record: bytes) -> tuple[int, int, int]:
        """Return version, flags and where the body begins; what has a checksum of its envelope matches it."""
        if len(record) < _HEADER.size:
            raise MalformedRecord("truncated record")
        version, flags, length = _HEADER.unpack_from(record)
        if version not in {RECORD_VERSION, SEALED_VERSION}:
            raise MalformedRecord(f"record version {version} is neither {RECORD_VERSION} nor {SEALED_VERSION}")
        if flags & ~_FLAGS:
            raise MalformedRecord(f"record with unknown flags {flags}")
        start = _HEADER.size + length
        if len(record) < start:
            raise MalformedRecord("truncated record")
        if version == RECORD_VERSION:
            head = bytes(record[_HEADER.size : start])
            found = _CHECKSUM.fullmatch(head, max(0, length - _CHECKSUM_OCTETS))
            if bool(found) != bool(flags & _FLAG_CHECKED):
                raise MalformedRecord("damaged: only one of its checksum and the flag for it is there")
            if found and _checksum(record[: _HEADER.size], head[: found.start()] + b"}", found[1]) != found[2]:
                raise MalformedRecord("damaged: its envelope does not match its checksum")
        elif flags & _FLAG_CHECKED:
            raise MalformedRecord("sealed record with a checksum")
        return version, flags, start

    @staticmethod
    def _elsewhere(where: bytes) -> BodyElsewhere:
        try:
            host, path = json.loads(where)
        except (ValueError, TypeError, RecursionError) as error:
            raise MalformedRecord("it does not say where its body is") from error
        return BodyElsewhere(printable(str(host)), printable(str(path)))


def _checked(flags: int, head: bytes, body: bytes) -> bytes:
    """Return what stands in front of a body: header, and envelope with the checksum."""
    header = _HEADER.pack(RECORD_VERSION, flags | _FLAG_CHECKED, len(head) - 1 + _CHECKSUM_OCTETS)
    of_body = b"%08x" % zlib.crc32(body)
    return b"".join((header, head[:-1], b',"crc":"', of_body, _checksum(header, head, of_body), b'"}'))


def _checksum(header: bytes, head: bytes, of_body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(of_body, zlib.crc32(head, zlib.crc32(header)))


def _checksum_of_body(head: bytes) -> int:
    found = _CHECKSUM.fullmatch(head, len(head) - _CHECKSUM_OCTETS)
    return int(found[1], 16) if found else -1


def _unfolded(body: bytes, size: int) -> bytes:
    """Return a compressed body of so many octets: no more than that is ever made of it. Raises MalformedRecord."""
    if _most and size > _most:
        raise MalformedRecord(f"its body would unfold to {size} octets: more than twice smtp.max_message_bytes")
    try:
        # zstd makes room for as much as a frame announces, whatever it is told.
        announced = zstandard.get_frame_parameters(body).content_size
        if announced not in {size, zstandard.CONTENTSIZE_UNKNOWN}:
            raise MalformedRecord(f"body has {announced} octets, its envelope says {size}")
        return _codecs.decompressor.decompress(body, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise MalformedRecord(f"unreadable body: {error}") from error


def _check_wire_form(body: bytes, *, trusted: bool) -> None:
    """Raise MalformedRecord for what is no body of one message: its end, or the server's, would come elsewhere."""
    if not body:
        return
    if bytes(body[-2:]) != b"\r\n":
        raise MalformedRecord("its body does not end with CRLF")
    start = bytes(body[:2])
    if start in {b".\r", b".\n"} or _LONE_DOT.search(body) or (not trusted and _LONE_DOT_ANYHOW.search(body)):
        raise MalformedRecord("its body has a line of a single dot, which would end it early")


def _is_worth_compressing(body: bytes) -> bool:
    size = len(body)
    if size < _SAMPLE_FROM:
        return size >= _COMPRESS_FROM
    starts = range(size // (2 * _SAMPLES), size, size // _SAMPLES)
    sample = b"".join(body[start : start + _SAMPLE] for start in starts)
    return len(_codecs.compressor.compress(sample)) < _WORTH * len(sample)


def _promised(record: dict[str, list[int]], recipients: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    promised = tuple((name, tuple(indices)) for name, indices in record.items())
    if not all(indices and all(type(i) is int and 0 <= i < recipients for i in indices) for _, indices in promised):
        raise ValueError("a copy is promised to recipients that it does not have")
    return promised


def _any_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _text(value: object) -> str:
    """Return an address or a parameter of an envelope: a line end would end the command."""
    text = _any_text(value)
    if _LINE_END.search(text):
        raise TypeError("a line end in a command")
    return text


def _texts(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("not a list")
    return tuple(map(_text, values))


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError("not a number")
    return value


def _own_envelope(head: bytes, message_id: str) -> Envelope:
    envelope = Envelope.from_json(head)
    if envelope.id != message_id:
        raise MalformedRecord(f"the record of {printable(str(envelope.id))}")
    return envelope


def _opened(front: bytes, message_id: str) -> sealing.Opened:
    return _authentic(lambda: sealing.open_front(message_id, front))


def _authentic(opening: Callable[[], T]) -> T:
    try:
        return opening()
    except sealing.MissingKey as error:
        raise LockedRecord(str(error)) from error
    except sealing.Forged as error:
        raise MalformedRecord(f"unreadable: {error}") from error


@dataclass(frozen=True, slots=True)
class Destination:
    """A server that we deliver to: the primary or a backup.

    ``name`` labels it everywhere (settings, queue, metrics); it never holds user information. ``password`` is
    the secret itself and is kept out of ``repr`` and of the stored form; ``password_from`` is a reference
    (``env:NAME``, ``file:/path``) that a later process resolves.
    """

    name: str
    host: str
    port: int
    scheme: str = "smtp"  # smtp, smtps or lmtp
    tls: str = "opportunistic"  # none, opportunistic, encrypt, verify (smtps: TLS from the first byte)
    username: str = ""
    password: str = field(default="", repr=False)
    password_from: str = ""
    domains: tuple[str, ...] = ()  # only recipients in these domains are copied; empty: all
    sender: str = "keep"  # or "null": copies carry the null sender
    soft_bounce: bool = False
    connections: int = 0  # at most this many at once, per worker process; 0: see workers.retry.Width
    ca_file: str = ""
    tls_certificate: str = ""  # ours, for a server that asks for one
    tls_key: str = ""

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def queue_name(self) -> str:
        """The RQ queue of this backup."""
        return f"backup-{self.name}"

    def wants(self, recipient: Recipient) -> bool:
        """Say whether a copy for this recipient goes to this backup."""
        return not self.domains or recipient.domain in self.domains

    def to_json(self) -> str:
        """Return the stored form, without the password."""
        names = [s for s in self.__slots__ if s != "password"]
        return json.dumps({s: getattr(self, s) for s in names}, sort_keys=True)

    @classmethod
    def from_json(cls, data: str | bytes) -> Destination:
        """Read the stored form. Raises ValueError for what is no destination."""
        try:
            record = json.loads(data)
            record["domains"] = _texts(record.get("domains", []))
            known = {k: v for k, v in record.items() if k in cls.__slots__ and k != "password"}
            found = cls(**known)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"unreadable destination: {printable(str(error))}") from error
        texts = [value for key, value in known.items() if key not in _NO_TEXTS]
        fine = (
            is_destination_name(found.name)
            and all(isinstance(value, str) and not _CONTROL.search(value) for value in texts)
            and type(found.port) is int
            and 0 < found.port < 65536
            and found.scheme in {"smtp", "smtps", "lmtp"}
            and found.tls in {"none", "opportunistic", "encrypt", "verify"}
            and found.sender in {"keep", "null"}
            and type(found.connections) is int
            and found.connections >= 0
            and type(found.soft_bounce) is bool
        )
        if not fine:
            raise ValueError("unreadable destination: a field has not the form that it should")
        return found
