"""An SMTP reply as a value: code, text lines, and what the code means."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from relay.mail.text import printable

_STATUS = re.compile(r"[245]\.\d{1,3}\.\d{1,3}(?![\d.])")
_TOO_MANY = re.compile(r"too many (?:rcpts?|recipients)", re.IGNORECASE)
_REPLY_LINE_LIMIT = 512  # RFC 5321 4.5.3.1.5


class Reply(NamedTuple):
    """One SMTP reply: a code and its text lines without code and CRLF (RFC 5321 4.2)."""

    code: int
    lines: tuple[str, ...]

    @classmethod
    def of(cls, code: int, *lines: str) -> Reply:
        """Make a reply of the relay's own."""
        return cls(code, lines or ("",))

    @property
    def is_positive(self) -> bool:
        return 200 <= self.code < 300

    @property
    def takes_message(self) -> bool:
        """Whether it is a yes to the end of a message, which neither a greeting (220) nor a goodbye (221) is."""
        return self.is_positive and self.code not in (220, 221)

    @property
    def is_temporary(self) -> bool:
        """Whether it is neither 2xx, 354 nor 5xx: an unknown code counts as temporary."""
        return not self.is_positive and not self.is_permanent and self.code != 354

    @property
    def is_permanent(self) -> bool:
        return 500 <= self.code < 600

    @property
    def status(self) -> str:
        """The enhanced status code (RFC 3463), "" if there is none."""
        found = _STATUS.match(self.lines[0])
        return found[0] if found else ""

    @property
    def is_too_many_recipients(self) -> bool:
        """Whether it says that this transaction has too many recipients, with whatever code.

        RFC 5321 4.5.3.1.10 has 452, formerly 552; some servers use 451, 503, 550 or 554.
        """
        if self.code < 400:
            return False
        return self.status[2:] == "5.3" or _TOO_MANY.search(" ".join(self.lines)) is not None

    @property
    def text(self) -> str:
        """The reply on one line, code first, for logs and listings."""
        return printable(f"{self.code} {' '.join(self.lines)}".rstrip())


@lru_cache(maxsize=100)  # all but the reply to the dot are the same for message after message
def wire(reply: Reply) -> bytes:
    """Return the reply as sent to a client: each line printable and at most 512 octets with its CRLF."""
    code, lines = reply
    if len(lines) == 1 and lines[0].isascii() and lines[0].isprintable():
        return f"{code:03d} {lines[0][: _REPLY_LINE_LIMIT - 6]}\r\n".encode("ascii")
    last = len(lines) - 1
    return b"".join(
        b"%03d%s" % (code, b" " if i == last else b"-")
        + printable(line).encode("utf-8", "backslashreplace")[: _REPLY_LINE_LIMIT - 6]
        + b"\r\n"
        for i, line in enumerate(lines)
    )
