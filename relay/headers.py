"""The Received line that we put on top of every message, and the hops that it has made before.

Only the header block is read: what looks like a trace line in a body counts for nothing. Nothing here
fails; whatever a client said is made safe before it stands in a line.
"""

from __future__ import annotations

import hashlib
import re
import time
from email.utils import formatdate
from functools import lru_cache

_UNSAFE = re.compile(r"[^A-Za-z0-9._:\[\]-]")
_MARK = "(smtp-dup)"
_RECEIVED = re.compile(rb"(?mi)^received:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*")
_TRACE_BLOCK = re.compile(
    rb"(?i)(?:(?:received|return-path|x-original-to|delivered-to):[^\r\n]*(?:\r\n[ \t][^\r\n]*)*\r\n)*"
)
_NO_FIELD = re.compile(rb"(?m)^(?![!-9;-~]++[ \t]*+:|[ \t])")  # a line that ends the header without being empty
_DIGEST_DIGITS = 30
_MESSAGE_ID = re.compile(rb"(?mi)^message-id:[ \t\r\n]*(\S+)")


def received_line(*, helo: str, address: str, domain: str, protocol: str, message_id: str) -> bytes:
    """Return our trace line (RFC 5321 4.4), ended by CRLF.

    No ``for`` clause: it would show a blind copy's address to the other recipients. ``protocol`` is the
    keyword of RFC 3848 and RFC 6531 (ESMTP, ESMTPS, UTF8SMTP...).
    """
    name = _UNSAFE.sub("?", helo[:255]) or "unknown"
    literal = f"IPv6:{address}" if ":" in address else address
    line = (
        f"Received: from {name} ([{literal or 'unknown'}])\r\n"
        f"\tby {domain} {_MARK} with {protocol} id {message_id};\r\n"
        f"\t{_date(int(time.time()))}\r\n"
    )
    return line.encode("ascii", "replace")


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, localtime=True)


def protocol_keyword(*, extended: bool, tls: bool, authenticated: bool, utf8: bool) -> str:
    """Return the ``with`` keyword: RFC 3848, and RFC 6531 4.3 for internationalised mail."""
    if not extended:
        return "SMTP"
    return ("UTF8SMTP" if utf8 else "ESMTP") + ("S" if tls else "") + ("A" if authenticated else "")


def header_block(body: bytes, start: int = 0) -> bytes:
    """Return the header block of a body in wire form, up to the empty line."""
    if body.startswith(b"\r\n", start):
        return b""
    end = body.find(b"\r\n\r\n", start)
    return body[start:] if end < 0 else body[start : end + 2]


def fields_only(block: bytes) -> bytes:
    """Return a header block up to the first line that is no field: without an empty line all of a text is one."""
    end = _NO_FIELD.search(block)
    return block[: end.start()] if end else block


def count_fields(block: bytes) -> int:
    """Return how many header fields a header block has; folded lines belong to the one above."""
    return block.count(b"\r\n") - block.count(b"\r\n ") - block.count(b"\r\n\t")


def count_hops(block: bytes, domain: str) -> tuple[int, int]:
    """Return how many Received lines a header block has, and how many of them are ours."""
    ours = f"by {domain} {_MARK} ".encode("ascii", "replace")
    lines = _RECEIVED.findall(block)
    return len(lines), sum(ours in line for line in lines)


def equality_digest(sender: str, body: bytes) -> str:
    """Return a name for equal mail: sender, Message-ID, all below the leading trace lines; "" without a Message-ID.

    A client that sends again after a lost reply may add other trace lines, but changes nothing else.
    """
    leading = _TRACE_BLOCK.match(body)
    start = leading.end() if leading else 0
    found = _MESSAGE_ID.search(header_block(body, start))
    if not found:
        return ""
    # Processors have instructions for SHA-256: it is twice as fast as BLAKE2, which counts for a large message.
    digest = hashlib.sha256(memoryview(body)[start:])
    digest.update(b"\0" + sender.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:_DIGEST_DIGITS]
