"""The stored record of a message: ``Message.pack`` compresses and seals it, ``Message.unpack`` reads it.

The stored form (version 1, or 2 when sealed) is the same in the ledger and in the spool, so that a record moves between
them byte for byte. A record that is damaged, invalid or could not be sent as one message raises MalformedRecord; one
whose key is missing raises its subclass LockedRecord. Nothing here does I/O.

In version 1 the envelope ends with a checksum, and a flag says so, so that the loss of either is detected: CRC-32 of
the stored body, continued over header and envelope. Versions without checksums ignore both, and records stored by them
are read without. A sealed record is authentic or Forged.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import zstandard

from relay.mail import encryption
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.stored import parsed
from relay.mail.text import printable

T = TypeVar("T")

RECORD_VERSION = 1
SEALED_VERSION = 2
_HEADER = struct.Struct("!BBI")  # version, flags, octets before the body: the envelope as JSON, or sealed
_FLAG_ZSTD = 1
_FLAG_ELSEWHERE = 2  # in place of the body: JSON with host and path of the file that holds the whole record
_FLAG_CHECKED = 4  # the envelope ends with a checksum
_FLAGS = _FLAG_ZSTD | _FLAG_ELSEWHERE | _FLAG_CHECKED
_CHECKSUM = re.compile(rb',"crc":"([0-9a-f]{8})([0-9a-f]{8})"\}')
_CHECKSUM_OCTETS = len(b',"crc":"0123456789abcdef"}')
_COMPRESS_FROM = 512  # octets; in a smaller body zstd's frame costs more than it saves
# A larger body is compressed only if samples of it shrink to this part. Base64 of compressed data (images, archives)
# shrinks to 3/4: moving a quarter less is not worth the processor time of both sides.
_SAMPLE_FROM, _WORTH = 256 << 10, 0.7
_SAMPLES, _SAMPLE = 4, 16 << 10
# A lone dot would end DATA. The relay writes no bare CR or LF, but some servers take one as a line end.
_LONE_DOT = re.compile(rb"\n\.[\r\n]")
_LONE_DOT_ANYHOW = re.compile(rb"\r\.[\r\n]")
_SLICE = 1 << 20
_UNFOLDS = 64 << 20  # octets; any body up to this size may be decompressed


class _Codecs(threading.local):
    """zstd contexts, which are expensive to make and must not be shared between threads."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


_codecs = _Codecs()
_most = _UNFOLDS


def bound(octets: int) -> None:
    """Limit the size of decompressed bodies in this process; ``octets`` is ``smtp.max_message_bytes``, 0 for no limit.

    Twice as many are allowed, for stuffed dots and the Received line. A body up to ``_UNFOLDS`` is always allowed: it
    may have been accepted under an earlier limit.
    """
    global _most  # noqa: PLW0603 - one for each process: what is stored passes through many hands
    _most = max(_UNFOLDS, 2 * octets) if octets else 0


class LockedRecord(MalformedRecord):
    """A stored message that is sealed with a missing key; it waits until the key is in the file again."""


class BodyElsewhere(Exception):
    """A stored message whose body has been moved to the file ``path`` on ``host``.

    ``trouble`` says why the file cannot be read on that host.
    """

    def __init__(self, host: str, path: str, trouble: str = "") -> None:
        super().__init__(
            f"the body is in {path}, {trouble}" if trouble else f"the body is kept on host {host} in {path}"
        )
        self.host = host
        self.path = path


class TooLarge(Exception):
    """The body of a record is larger than what was asked for."""


class Message(NamedTuple):
    """An envelope and its body.

    ``body`` is the wire form: dot-stuffed, below the relay's Received line, every line ended by CRLF, without the
    end-of-data line. It is sent to a server unchanged, followed by ``.CRLF``. In a worker it may be a memoryview of the
    record, which serves for writing only.
    """

    envelope: Envelope
    body: bytes

    def pack(self) -> bytes:
        """Return the stored record: the body is compressed if that pays, the whole is sealed if there is a key."""
        return b"".join(self.packed())

    def packed(self) -> tuple[bytes, ...]:
        """Return the stored record in parts; the last may be the body itself, to avoid a copy of a large one."""
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
        """Return a stored record with host and path in place of its body. Raises MalformedRecord."""
        version, flags, head, _ = cls._layout(record)
        where = json.dumps([host, path]).encode("ascii")
        if version == RECORD_VERSION:
            if flags & _FLAG_CHECKED:
                head = head[:-_CHECKSUM_OCTETS] + b"}"
            return _checked(_FLAG_ELSEWHERE, head, where) + where
        return b"".join((_HEADER.pack(version, _FLAG_ELSEWHERE, len(head)), head, where))

    @classmethod
    def unpack(cls, record: bytes, message_id: str, most: int = sys.maxsize) -> Message:
        """Read the stored record of a message. Raises MalformedRecord, LockedRecord, BodyElsewhere.

        Raises TooLarge, before any work on the body, if that has more than ``most`` octets.
        """
        version, flags, head, start = cls._layout(record)
        body = record[start:]  # the record may be a memoryview
        # _layout has checked the header.
        if flags & _FLAG_CHECKED and b"%08x" % zlib.crc32(body) != head[-_CHECKSUM_OCTETS + 8 : -10]:
            raise MalformedRecord("damaged: its body does not match its checksum")
        if flags & _FLAG_ELSEWHERE:
            if version == RECORD_VERSION:
                _own_envelope(head, message_id)
            raise cls._elsewhere(bytes(body))
        opened, sealed = (_opened(head, message_id), body) if version == SEALED_VERSION else (None, body)
        envelope = _own_envelope(opened.envelope if opened else head, message_id)
        if envelope.size > most:
            raise TooLarge(envelope.size)
        if opened:
            body = _authentic(lambda: opened.body(sealed, flags))
        if flags & _FLAG_ZSTD:
            body = _unfolded(body, envelope.size)
        if len(body) != envelope.size:
            raise MalformedRecord(f"body has {len(body)} octets, its envelope says {envelope.size}")
        _check_wire_form(body, trusted=version == SEALED_VERSION or bool(flags & _FLAG_CHECKED))
        return cls(envelope, body)

    @classmethod
    def unpack_envelope(cls, record: bytes, message_id: str) -> Envelope:
        """Read only the envelope; the first part of the record is enough. Raises as ``unpack`` does."""
        version, _, head, _ = cls._layout(record)
        if version == SEALED_VERSION:
            head = _opened(head, message_id).envelope
        return _own_envelope(head, message_id)

    @staticmethod
    def _layout(record: bytes) -> tuple[int, int, bytes, int]:
        """Return version, flags, envelope and the offset of the body; checks the checksum. Raises MalformedRecord."""
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
        head = bytes(record[_HEADER.size : start])
        if version == RECORD_VERSION:
            found = _CHECKSUM.fullmatch(head, max(0, length - _CHECKSUM_OCTETS))
            if bool(found) != bool(flags & _FLAG_CHECKED):
                raise MalformedRecord("damaged: only one of its checksum and the flag for it is there")
            if found and _checksum(record[: _HEADER.size], head[: found.start()] + b"}", found[1]) != found[2]:
                raise MalformedRecord("damaged: its envelope does not match its checksum")
        elif flags & _FLAG_CHECKED:
            raise MalformedRecord("sealed record with a checksum")
        return version, flags, head, start

    @staticmethod
    def _elsewhere(where: bytes) -> BodyElsewhere:
        try:
            host, path = parsed(where)
        except (ValueError, TypeError) as error:
            raise MalformedRecord("it does not say where its body is") from error
        return BodyElsewhere(printable(str(host)), printable(str(path)))


def _checked(flags: int, head: bytes, body: bytes) -> bytes:
    """Return the part before the body: header, and envelope with the checksum."""
    header = _HEADER.pack(RECORD_VERSION, flags | _FLAG_CHECKED, len(head) - 1 + _CHECKSUM_OCTETS)
    of_body = b"%08x" % zlib.crc32(body)
    return b"".join((header, head[:-1], b',"crc":"', of_body, _checksum(header, head, of_body), b'"}'))


def _checksum(header: bytes, head: bytes, of_body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(of_body, zlib.crc32(head, zlib.crc32(header)))


def _unfolded(body: bytes, size: int) -> bytes:
    """Decompress a body of ``size`` octets; never allocates more than that. Raises MalformedRecord."""
    if _most and size > _most:
        raise MalformedRecord(f"its body would unfold to {size} octets: more than twice smtp.max_message_bytes")
    try:
        # zstd allocates what the frame announces, whatever limit it is given.
        announced = zstandard.get_frame_parameters(body).content_size
        if announced not in {size, zstandard.CONTENTSIZE_UNKNOWN}:
            raise MalformedRecord(f"body has {announced} octets, its envelope says {size}")
        return _codecs.decompressor.decompress(body, max_output_size=size, allow_extra_data=False)
    except (zstandard.ZstdError, MemoryError) as error:
        raise MalformedRecord(f"unreadable body: {error}") from error


def _check_wire_form(body: bytes, *, trusted: bool) -> None:
    """Raise MalformedRecord if a server would not read this body as exactly one message."""
    if not body:
        return
    if bytes(body[-2:]) != b"\r\n":
        raise MalformedRecord("its body does not end with CRLF")
    is_lone = bytes(body[:2]) in {b".\r", b".\n"} or _has(_LONE_DOT, body)
    if is_lone or (not trusted and _has(_LONE_DOT_ANYHOW, body)):
        raise MalformedRecord("its body has a line of a single dot, which would end it early")


def _has(pattern: re.Pattern[bytes], body: bytes) -> bool:
    """Search for three octets, in slices: while it searches, no other thread runs.

    A pattern takes the same time in every build of Python; ``in``, in one without its optimisations, up to ten times.
    """
    return any(pattern.search(body, at, at + _SLICE + 2) for at in range(0, len(body), _SLICE))


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
