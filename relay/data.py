"""Reading the body of a DATA command: in chunks, up to CRLF.CRLF and nothing else (RFC 5321 4.1.1.4).

Bytes are passed on as they came, dot-stuffed; only the end-of-data line is kept back. Other line ends
around a dot (LF.LF, CR.CR) travel inside the body: taking them as the end is how mail is smuggled.
A client that goes away before the end raises ClientGone.
"""

from __future__ import annotations

from asyncio import StreamReader

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


def unread(reader: StreamReader, data: bytes) -> None:
    """Put bytes back in front of the reader's buffer: a pipelining client's next commands."""
    # StreamReader has no public way; aiosmtpd itself works on this attribute.
    reader._buffer[:0] = data  # type: ignore[attr-defined]  # noqa: SLF001
