"""The Received line that is put on top of every message, and the count of the hops it has made before.

Only the header block is read: trace lines in a body do not count. Nothing here raises; text from a client is made safe
before it becomes part of a line. A message without an empty line is all header: so callers limit how far to look, and
no work here grows with the message except its digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
import time
from email.utils import formatdate
from functools import lru_cache
from typing import NamedTuple

from relay.mail.text import printable

_UNSAFE = re.compile(r"[^A-Za-z0-9._:\[\]-]")
_MARK = "(smtp-dup)"
_BLANKS = (b" ", b"\t")
_RECEIVED = b"\r\nreceived:"
_MOST_HOPS = 1 << 10  # Received lines that are examined
_TRACE_BLOCK = re.compile(
    rb"(?i)(?:(?:received|return-path|x-original-to|delivered-to):[^\r\n]*(?:\r\n[ \t][^\r\n]*)*\r\n)*"
)
_NO_FIELD = re.compile(rb"(?m)^(?![!-9;-~]++[ \t]*+:|[ \t])")  # a line that is no field ends the header too
_DIGEST_DIGITS = 30
_DIGEST_LOOK = 256 << 10  # octets in which a Message-ID is looked for
_SLICE = 64 << 10
_ID_SHOWN = 250  # octets of a Message-ID
_MESSAGE_ID = re.compile(rb"(?mi)^message-id:[ \t\r\n]*(\S+)")


def received_line(*, helo: str, address: str, domain: str, protocol: str, message_id: str) -> bytes:
    """Return the relay's trace line (RFC 5321 4.4), with its CRLF.

    No ``for`` clause: it would show a blind copy's address to the other recipients. ``protocol`` is the
    keyword of RFC 3848 and RFC 6531 (ESMTP, ESMTPS, UTF8SMTP...).
    """
    line = f"{_from(helo, address, domain, protocol)} id {message_id};\r\n\t{_date(int(time.time()))}\r\n"
    return line.encode("ascii", "replace")


@lru_cache(maxsize=64)  # clients that send one message after another
def _from(helo: str, address: str, domain: str, protocol: str) -> str:
    name = _UNSAFE.sub("?", helo[:255]) or "unknown"
    literal = f"IPv6:{address}" if ":" in address else address
    return f"Received: from {name} ([{literal or 'unknown'}])\r\n\tby {domain} {_MARK} with {protocol}"


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, localtime=True)


@lru_cache(maxsize=16)
def protocol_keyword(*, extended: bool, tls: bool, authenticated: bool, utf8: bool) -> str:
    """Return the ``with`` keyword: RFC 3848, and RFC 6531 4.3 for internationalised mail."""
    if not extended:
        return "SMTP"
    return ("UTF8SMTP" if utf8 else "ESMTP") + ("S" if tls else "") + ("A" if authenticated else "")


def header_block(body: bytes, start: int = 0, most: int = sys.maxsize) -> bytes:
    """Return the header block of a body in wire form, up to the empty line, cut at ``most`` octets."""
    if body.startswith(b"\r\n", start):
        return b""
    stop = min(len(body), start + most)
    end = body.find(b"\r\n\r\n", start, stop)
    return body[start:stop] if end < 0 else body[start : end + 2]


async def fields_only(block: bytes) -> bytes:
    """Return a header block up to the first line that is no field, for a message without an empty line.

    Works in slices, and yields to other tasks between them.
    """
    at = 0
    while at < len(block):
        end = block.find(b"\n", at + _SLICE) + 1 or len(block)
        found = _NO_FIELD.search(block, at, end)
        if found and found.start() < end:
            return block[: found.start()]
        at = end
        await asyncio.sleep(0)
    return block


def count_fields(block: bytes) -> int:
    """Return the number of header fields in a header block; folded lines belong to the field above."""
    return block.count(b"\r\n") - block.count(b"\r\n ") - block.count(b"\r\n\t")


def has_looped(block: bytes, domain: str, most_hops: int, most_own: int) -> bool:
    """Return whether a header block has more Received lines than that, or more that this relay wrote.

    Octets are searched directly: for a block of a megabyte, a regular expression takes ten times as long.
    """
    ours = _own_mark(domain)
    text = b"\r\n" + block.lower()
    if text.count(_RECEIVED) <= most_hops and text.count(ours) <= most_own:
        return False
    hops = own = 0
    at = text.find(_RECEIVED)
    while at >= 0 and hops < _MOST_HOPS:
        end = text.find(b"\r\n", at + 2)
        while end >= 0 and text[end + 2 : end + 3] in _BLANKS:
            end = text.find(b"\r\n", end + 2)
        hops += 1
        own += text.find(ours, at, end if end >= 0 else len(text)) >= 0
        at = text.find(_RECEIVED, end) if end >= 0 else -1
    return hops > most_hops or own > most_own


@lru_cache(maxsize=2)
def _own_mark(domain: str) -> bytes:
    return f"by {domain} {_MARK} ".encode("ascii", "replace").lower()


class Named(NamedTuple):
    """Where a message begins below its leading trace lines, and its Message-ID as it is written, "" without one."""

    start: int
    message_id: bytes

    @property
    def text(self) -> str:
        """The Message-ID for logs and listings."""
        return printable(self.message_id[:_ID_SHOWN].decode("utf-8", "backslashreplace"))


def name_of(body: bytes) -> Named:
    """Return the Message-ID of a message."""
    leading = _TRACE_BLOCK.match(body, 0, _DIGEST_LOOK)
    start = leading.end() if leading else 0
    block = header_block(body, start, _DIGEST_LOOK)
    at = (b"\n" + block.lower()).find(b"\nmessage-id:")  # much faster than a search that ignores case
    found = _MESSAGE_ID.search(block, at) if at >= 0 else None
    return Named(start, found[1] if found else b"")


def equality_digest(sender: str, body: bytes, named: Named | None = None) -> str:
    """Return a digest of sender, Message-ID and everything below the leading trace lines; "" without a Message-ID.

    It is equal for the same message sent again after a lost reply: a client may change the trace lines, but nothing
    else. For a large body, call it in a thread. ``named`` is its ``name_of``, if that is known.
    """
    start, found = named or name_of(body)
    if not found:
        return ""
    # Processors have instructions for SHA-256, which makes it twice as fast as BLAKE2 for a large message.
    digest = hashlib.sha256(memoryview(body)[start:])
    digest.update(b"\0" + sender.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:_DIGEST_DIGITS]
