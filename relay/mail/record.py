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
import re
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import zstandard

from relay.mail import encryption
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.text import printable

T = TypeVar("T")

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
# A lone dot would end DATA. Where a bare CR or LF ends a line nothing of ours wrote it, but servers differ about that.
_LONE_DOT = re.compile(rb"\n\.[\r\n]")
_LONE_DOT_ANYHOW = re.compile(rb"\r\.[\r\n]")
_UNFOLDS = 64 << 20  # octets that a compressed body may have in any case


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


class LockedRecord(MalformedRecord):
    """A stored message that is sealed with a key which is not here, as yet; it waits."""


class BodyElsewhere(Exception):
    """A stored message whose body has been moved to a file; ``host`` and ``path`` say where.

    ``trouble`` says why the file cannot be read here, where it is.
    """

    def __init__(self, host: str, path: str, trouble: str = "") -> None:
        super().__init__(
            f"the body is in {path}, {trouble}" if trouble else f"the body is kept on host {host} in {path}"
        )
        self.host = host
        self.path = path


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
        if encryption.is_on():
            head, body = encryption.seal(self.envelope.id, flags, head, body)
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
        # What is of the form was seen to be in its place.
        if flags & _FLAG_CHECKED and b"%08x" % zlib.crc32(body) != head[-_CHECKSUM_OCTETS + 8 : -10]:
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


def _own_envelope(head: bytes, message_id: str) -> Envelope:
    envelope = Envelope.from_json(head)
    if envelope.id != message_id:
        raise MalformedRecord(f"the record of {printable(str(envelope.id))}")
    return envelope


def _opened(front: bytes, message_id: str) -> encryption.Opened:
    return _authentic(lambda: encryption.open_front(message_id, front))


def _authentic(opening: Callable[[], T]) -> T:
    try:
        return opening()
    except encryption.MissingKey as error:
        raise LockedRecord(str(error)) from error
    except encryption.Forged as error:
        raise MalformedRecord(f"unreadable: {error}") from error
