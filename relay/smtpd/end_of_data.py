"""Find the end of a DATA body, CRLF.CRLF and nothing else (RFC 5321 4.1.1.4), and limit how slowly it may arrive.

The octets come out as received, still dot-stuffed, without the end-of-data line. Other line ends around a dot (LF.LF,
CR.CR) are part of the body: accepting them as the end allows SMTP smuggling. Only clients that the settings name, such
as printers and scanners that do not send CRLF, may end lines and messages with LF (``EndOfLines``). A client that
disconnects before the end, or is too slow, raises ClientGone in the reader of the body.
"""

from __future__ import annotations

import re

_MOST_RETURNS = 8  # CRs that count as part of the LF after them
_LF = re.compile(rb"\r{0,8}\n")
_LONE_DOT = re.compile(rb"\n\.\r{0,8}\n")
_MAY_BE_LONE_DOT = re.compile(rb"\n\.\r{0,8}\Z")
_END = b"\r\n.\r\n"


class ClientGone(ConnectionError):
    """The client closed the connection in the middle of its message."""


class EndOfData:
    """Finds CRLF.CRLF in chunks of any size; once ``found``, ``rest`` holds the octets after it."""

    __slots__ = ("_context", "_held", "found", "rest")

    def __init__(self) -> None:
        # The CRLF of the DATA line counts: a lone dot right after it ends an empty message.
        self._context = b"\r\n"
        self._held = 0
        self.found = False
        self.rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk, return what of it is body for certain; sets ``found`` and ``rest`` at the end."""
        if not self._held and b"." not in chunk:  # as in base64: nothing to search, nothing to copy
            self._context = chunk[-4:] if len(chunk) >= 4 else (self._context + chunk)[-4:]
            return chunk
        data = self._context + chunk
        start = len(self._context) - self._held
        end = data.find(_END)
        if end >= 0:
            self.found = True
            self.rest = data[end + len(_END) :]
            return data[start : end + 2]
        # A dot at the start of a line, followed by nothing or by a CR, may be the end-of-data line.
        self._held = 1 if data.endswith(b"\r\n.") else 2 if data.endswith(b"\r\n.\r") else 0
        self._context = data[-4:]
        return data[start : len(data) - self._held]


class EndOfLines:
    """The same for a client whose lines end with LF; as in Postfix, CRs before the LF belong to the line end.

    A lone dot on a line ends the message. Each line end comes out as CRLF. Dots are left alone: the client stuffs them
    at the same line starts that are recognised here. A CR elsewhere stays as it is.
    """

    def __init__(self) -> None:
        self._at_start = True  # of a line, as after the DATA command
        self._held = b""  # CRs that may belong to a line end, with the dot before them if the line has nothing else
        self.found = False
        self.rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk, return what of it is body for certain; sets ``found`` and ``rest`` at the end."""
        begin = int(self._at_start)
        data = b"\n" * begin + self._held + chunk
        if (end := _LONE_DOT.search(data)) is not None:
            self.found = True
            self.rest = data[end.end() :]
            return _with_crlf(data[begin : end.start() + 1])
        certain = self._certain(data)
        self._held = data[certain:]
        self._at_start = data.endswith(b"\n", 0, certain)
        return _with_crlf(data[begin:certain])

    @staticmethod
    def _certain(data: bytes) -> int:
        """Return how many octets are body whatever follows: neither half a line end nor half an end of data."""
        tail = data[-_MOST_RETURNS - 2 :]
        begins = len(data) - len(tail)
        if (dot := _MAY_BE_LONE_DOT.search(tail)) is not None:
            return begins + dot.start() + 1
        return len(data) - min(_MOST_RETURNS, len(tail) - len(tail.rstrip(b"\r")))


def _with_crlf(data: bytes) -> bytes:
    """Return data with each line end (CRs and LF) as CRLF."""
    if b"\r" not in data:
        return data.replace(b"\n", b"\r\n")
    return _LF.sub(b"\r\n", data)


class Pace:
    """The time that a client may take for one message: a limit on each silence, and a minimum rate overall.

    Without the minimum rate, one octet a minute would hold a connection to the primary for days.
    """

    __slots__ = ("_idle_seconds", "_left", "_rate")

    def __init__(self, idle_seconds: float, rate: int) -> None:
        """``rate`` is the minimum in octets a second; 0 means none."""
        self._idle_seconds = self._left = idle_seconds
        self._rate = rate

    @property
    def seconds(self) -> float:
        """How long the reader may wait for the next octets."""
        return min(self._left, self._idle_seconds)

    def count(self, octets: int, seconds: float) -> None:
        """Note that ``octets`` arrived after a wait of ``seconds``."""
        if self._rate:
            self._left += octets / self._rate - seconds
