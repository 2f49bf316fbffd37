"""Parses a server's octets into replies, however they are split into packets.

Linear in the input, and bounded: a reply has at most 100 lines and 64 KiB, and 512 octets of each line are kept. A
malformed reply raises ValueError, after which the parser must not be used. A reply that is cut off after its code
("250-", then the end of the stream) counts: only text is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from relay.mail.reply import Reply
from relay.mail.text import printable

_LINE_KEPT = 512 - len("250 \r\n")  # RFC 5321 4.5.3.1.5; longer lines are accepted and cut
_MAX_LINES = 100
_MAX_REPLY = 64 * 1024  # octets; no real reply comes near
_MARKS = (b" ", b"-", b"")


class ReplyParser:
    """Parses the replies of one connection."""

    __slots__ = ("_code", "_lines", "_size", "_tail", "is_between")

    def __init__(self) -> None:
        self.is_between = True  # no incomplete reply is buffered
        self._tail = bytearray()  # a line without its end yet
        self._code = b""  # of the multi-line reply being read
        self._lines: list[str] = []
        self._size = 0

    def feed(self, data: bytes, take: Callable[[Reply], object]) -> None:
        """Give the replies that these octets complete. Raises ValueError, after the replies before the fault."""
        if self._tail:
            self._tail += data
            if b"\n" not in data:  # only the new octets are searched: many tiny packets stay linear
                if len(self._tail) > _MAX_REPLY:
                    raise ValueError("a line without an end")
                return
            data = bytes(self._tail)
            self._tail.clear()
        *lines, rest = data.split(b"\n")
        self._tail += rest
        for line in lines:
            line = line.removesuffix(b"\r")  # noqa: PLW2901 - its end belongs to the line's
            reply = None if self._lines else plain(line)
            if reply is not None or (reply := self._line(line)) is not None:
                take(reply)
        if len(rest) > _MAX_REPLY:
            raise ValueError("a line without an end")
        self.is_between = not (self._tail or self._lines)

    def finish(self) -> Reply | None:
        """At the end of the stream, return the incomplete reply if its code is there, else None. Raises ValueError."""
        reply = None
        if len(self._tail) >= 3:
            reply = self._line(bytes(self._tail).removesuffix(b"\r"))
        self._tail.clear()
        if reply is None and self._lines:
            reply, self._lines = Reply(int(self._code), tuple(self._lines)), []
        return reply

    def _line(self, line: bytes) -> Reply | None:
        code, mark = line[:3], line[3:4]
        if len(code) != 3 or not code.isdigit() or mark not in _MARKS:
            raise ValueError("not a reply line")
        text = safe_text(line[4:])
        if not self._lines and mark != b"-":
            return Reply(int(code), (text,))
        if self._lines and code != self._code:
            raise ValueError("two codes in one reply")
        self._code = code
        self._lines.append(text)
        self._size += len(line)
        if len(self._lines) > _MAX_LINES or self._size > _MAX_REPLY:
            raise ValueError("too long a reply")
        if mark == b"-":
            return None
        lines, self._lines, self._size = self._lines, [], 0
        return Reply(int(code), tuple(lines))


@lru_cache(maxsize=100)  # all but the reply to the dot are the same for message after message
def plain(line: bytes) -> Reply | None:
    """Return the reply that is one line of printable ASCII, without its CRLF, as nearly all are; else None."""
    if len(line) > _LINE_KEPT or not line.isascii():
        return None
    code, mark, text = (words := line.decode("ascii"))[:3], words[3:4], words[4:]
    return Reply(int(code), (text,)) if mark == " " and code.isdigit() and text.isprintable() else None


def safe_text(text: bytes) -> str:
    """Return the text of a reply line, safe to log and pass on: valid UTF-8 stays, the rest is escaped, 506 octets."""
    return printable(text[:_LINE_KEPT].decode("utf-8", "backslashreplace"))
