"""Reading a body: of DATA up to CRLF.CRLF and nothing else (RFC 5321 4.1.1.4), and at a pace that is bearable.

The octets come out as they came, dot-stuffed; only the end-of-data line is kept back. Other line ends around a dot
(LF.LF, CR.CR) are part of the body: taking them as the end is how mail is smuggled. Only the clients that the settings
name, printers and scanners that know no CRLF, may end their lines and messages with LF (``EndOfLines``). A client that
goes away before the end, or that is too slow, is a ClientGone.
"""

from __future__ import annotations

import re

_MOST_RETURNS = 8  # CRs that belong to the LF behind them
_LF = re.compile(rb"\r{0,8}\n")
_LONE_DOT = re.compile(rb"\n\.\r{0,8}\n")
_MAY_BE_LONE_DOT = re.compile(rb"\n\.\r{0,8}\Z")
_END = b"\r\n.\r\n"


class ClientGone(ConnectionError):
    """The client closed the connection in the middle of its message."""


class EndOfData:
    """Finds the end of data in a stream of chunks of any size; ``feed`` them, then read ``rest``."""

    def __init__(self) -> None:
        # The CRLF of the DATA line counts: a dot right after it is an empty message.
        self._context = b"\r\n"
        self._held = 0
        self.found = False
        self.rest = b""

    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk, return what of it is body for certain; sets ``found`` and ``rest`` at the end."""
        if not self._held and b"." not in chunk:  # as most of an attachment: nothing to look for, nothing to copy
            self._context = chunk[-4:] if len(chunk) >= 4 else (self._context + chunk)[-4:]
            return chunk
        data = self._context + chunk
        start = len(self._context) - self._held
        end = data.find(_END)
        if end >= 0:
            self.found = True
            self.rest = data[end + len(_END) :]
            return data[start : end + 2]
        # A dot at a line's start, alone so far or with a CR, may be the end-of-data line.
        self._held = 1 if data.endswith(b"\r\n.") else 2 if data.endswith(b"\r\n.\r") else 0
        self._context = data[-4:]
        return data[start : len(data) - self._held]


class EndOfLines:
    """The same for a client whose lines end with LF, with the CRs before it, as Postfix takes them.

    A line that is a dot ends the message. What comes out has CRLF for each of these line ends, and its dots as they
    are: for this client they are stuffed where a line begins for us. A CR elsewhere is left.
    """

    def __init__(self) -> None:
        self._at_start = True  # of a line, as after the line of DATA
        self._held = b""  # CRs that may belong to a line end, with the dot before them where that is all of the line
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
        """Return how much of the data nothing that comes can make a line end, or the end of the message."""
        tail = data[-_MOST_RETURNS - 2 :]
        begins = len(data) - len(tail)
        if (dot := _MAY_BE_LONE_DOT.search(tail)) is not None:
            return begins + dot.start() + 1
        return len(data) - min(_MOST_RETURNS, len(tail) - len(tail.rstrip(b"\r")))


def _with_crlf(data: bytes) -> bytes:
    """Return data whose lines end with CRLF, whatever they ended with."""
    if b"\r" not in data:
        return data.replace(b"\n", b"\r\n")
    return _LF.sub(b"\r\n", data)


class Pace:
    """The time that a client may take for one message: a while without a word, and in all what a slow line needs.

    Without the second, an octet a minute would hold a connection to the primary for days.
    """

    __slots__ = ("_idle_seconds", "_left", "_rate")

    def __init__(self, idle_seconds: float, rate: int) -> None:
        """``rate`` is in octets a second; 0 is any."""
        self._idle_seconds = self._left = idle_seconds
        self._rate = rate

    @property
    def seconds(self) -> float:
        """How long the client may be silent now."""
        return min(self._left, self._idle_seconds)

    def count(self, octets: int, seconds: float) -> None:
        """Note that so many octets came after so long."""
        if self._rate:
            self._left += octets / self._rate - seconds
