"""The mail that is sent: words and base64 in equal parts, as real mail is, the same at every run.

smtp-source's own messages are one letter repeated, which would flatter whoever compresses.
"""

from __future__ import annotations

import base64
import random
from pathlib import Path

_SYLLABLES = [
    "ka",
    "lo",
    "mi",
    "ren",
    "tas",
    "ur",
    "bel",
    "dor",
    "fin",
    "gal",
    "hem",
    "ist",
    "jor",
    "kel",
    "lun",
    "mar",
    "nos",
    "pir",
    "quo",
    "sel",
    "tor",
    "und",
    "vel",
    "wes",
    "xan",
    "yor",
    "zil",
]
_LINE = 76  # characters of a base64 line (RFC 2045 6.8)


def lines(size: int, seed: int = 1) -> list[bytes]:
    """Return the lines of a message that takes ``size`` octets with its CRLFs, about exactly."""
    source = random.Random(seed)
    text = [
        b"From: Ada <a@example.com>",
        b"To: Ben <b@example.com>",
        b"Subject: Minutes of the meeting",
        b"Date: Thu, 01 Jan 2026 10:00:00 +0000",
        b"Message-ID: <%016x@example.com>" % source.getrandbits(64),
        b"MIME-Version: 1.0",
        b"Content-Type: text/plain; charset=utf-8",
        b"",
    ]
    left = size - sum(len(line) + 2 for line in text)
    # A large message is an attachment; a small one is half words.
    words_left = min(left // 2, 8192)
    while words_left > 0:
        line = " ".join(_word(source) for _ in range(10)).encode()[: max(1, min(words_left, left) - 2)]
        text.append(line)
        words_left -= len(line) + 2
        left -= len(line) + 2
    encoded = base64.b64encode(source.randbytes(max(0, left) * 3 // 4))
    at = 0
    while left > 2:
        line = encoded[at : at + min(_LINE, left - 2)] or b"="
        at += len(line)
        text.append(line)
        left -= len(line) + 2
    return text


def wire(size: int, seed: int = 1) -> bytes:
    """Return a message as it goes over the wire, without the end-of-data line; no line starts with a dot."""
    return b"".join(line + b"\r\n" for line in lines(size, seed))


def file(folder: Path, size: int) -> Path:
    """Write a message for ``smtp-source -F``, which makes LF into CRLF."""
    path = folder / f"message-{size}.eml"
    if not path.exists():
        path.write_bytes(b"".join(line + b"\n" for line in lines(size)))
    return path


def _word(source: random.Random) -> str:
    return "".join(source.choice(_SYLLABLES) for _ in range(source.randint(1, 3)))
