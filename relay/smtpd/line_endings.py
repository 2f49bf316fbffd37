"""The line ends of a received body. No bare CR or LF is ever sent on, since that allows SMTP smuggling.

``LineEnds`` refuses bare CR and LF or turns them into CRLF, and stuffs a dot that would then look like the end of data;
``Stuffing`` gives a body received by BDAT the wire form of DATA. Both take pieces of any size, and the result does not
depend on how the body is split. A body with CRLF line ends passes unchanged, at a few microseconds a piece.
"""

from __future__ import annotations

from io import IncrementalNewlineDecoder

_CRLF = b"\r\n"
_newlines = IncrementalNewlineDecoder(None, translate=False)  # notes in one pass which line ends it has seen
_WHOLE, _BARE = "\u0100", "\n"  # marks for a CRLF and for a bare line end; no octet is the first
_DOT = (b"\n.", b".")  # the end of a piece whose last line may turn out to be a lone dot


class LineEnds:
    """Mends or refuses the line ends of one body: ``feed`` it in pieces, then ``finish``.

    ``stuffed`` says that the body is dot-stuffed (DATA). A bare CR or LF ends a line too; CR CR LF is one line end, as
    written by programs that turn LF into CRLF twice. With ``refuse``, the first bare CR or LF sets ``refused``, and
    nothing more comes out.
    """

    __slots__ = ("_after_bare", "_at_start", "_held", "_refuse", "_stuffed", "refused")

    def __init__(self, *, refuse: bool, stuffed: bool) -> None:
        self._refuse = refuse
        self._stuffed = stuffed
        self._held = b""  # octets that depend on the next piece: CRs, a dot at the start of a line
        self._at_start = True  # of a line
        self._after_bare = False  # at the start of a line, after a bare CR or LF
        self.refused = False

    def feed(self, piece: bytes) -> bytes:
        """Take a piece; returns the octets that no later piece can change."""
        if self._held:
            piece, self._held = self._held + piece, b""
        if not piece:
            return b""
        if self._refuse:
            return self._inspect(piece)
        # The next piece shows whether an LF follows the CRs at its end.
        text, returns = _without_returns(piece) if piece.endswith(b"\r") else (piece, 0)
        if self._after_bare or text[-2:] in _DOT or not _is_clean(text):
            text = self._mend(text)
        elif text:
            self._at_start = text.endswith(_CRLF)
        self._held += b"\r" * returns
        return text

    def finish(self) -> bytes:
        """Return the held octets and a missing last CRLF; only a body received by BDAT can need this."""
        if self._refuse and self._held:
            self.refused = True  # a CR whose LF never came
        if self.refused:
            return b""
        held, self._held = self._held, b""
        # Each CR without an LF ends a line.
        return held.replace(b"\r", _CRLF) if held else b"" if self._at_start else _CRLF

    def _inspect(self, piece: bytes) -> bytes:
        if piece.endswith(b"\r"):
            self._held, piece = b"\r", piece[:-1]  # its LF may still come
        if self.refused or not _is_clean(piece):
            self.refused = self._after_bare = True
            return b""
        self._at_start = piece.endswith(_CRLF)
        return piece

    def _mend(self, text: bytes) -> bytes:
        # All at once and not line by line: a body of a million line ends must not block the other clients.
        before = "" if not self._at_start else _BARE if self._after_bare else _WHOLE
        marked = before + text.decode("latin-1").replace("\r\r\n", _WHOLE).replace("\r\n", _WHOLE).replace("\r", _BARE)
        if self._stuffed:
            marked = _dotted(self._without_open_end(marked))
        if len(marked) > len(before):
            self._after_bare = marked.endswith(_BARE)
            self._at_start = self._after_bare or marked.endswith(_WHOLE)
        return marked[len(before) :].replace(_BARE, _WHOLE).replace(_WHOLE, "\r\n").encode("latin-1")

    def _without_open_end(self, marked: str) -> str:
        """Return the text without a dot that begins an unfinished last line; the dot is held."""
        if marked[-2:] in (_BARE + ".", _WHOLE + "."):
            self._held = b"."
            return marked[:-1]
        return marked


def _dotted(marked: str) -> str:
    """Return text, in which line ends are marked, with a dot added to each line that needs stuffing.

    A lone dot would end the message. After a bare CR or LF, the client may have stuffed a dot (if it takes that as a
    line end) or not (if it takes it as text): two dots are taken as one stuffed dot.
    """
    if "." not in marked:
        return marked
    marked = marked.replace(f"{_WHOLE}.{_BARE}", f"{_WHOLE}..{_BARE}")
    for _ in range(2):  # twice, since two adjacent lines share a line end
        marked = marked.replace(f"{_WHOLE}.{_WHOLE}", f"{_WHOLE}..{_WHOLE}")
    return marked.replace(f"{_BARE}.", f"{_BARE}..").replace(f"{_BARE}...", f"{_BARE}..")


def _is_clean(piece: bytes) -> bool:
    """Say whether every line end is a CRLF."""
    _newlines.reset()
    _newlines.decode(piece.decode("latin-1"), final=True)
    return _newlines.newlines in (None, "\r\n")


def _without_returns(line: bytes) -> tuple[bytes, int]:
    """Return a piece without the CRs at its end, two at most, and how many they are."""
    returns = 2 if line.endswith(b"\r\r") else 1 if line.endswith(b"\r") else 0
    return line[: len(line) - returns], returns


class Stuffing:
    """Doubles the dots at the starts of lines; no piece may end between CR and LF."""

    __slots__ = ("_at_start",)

    def __init__(self) -> None:
        self._at_start = True

    def feed(self, piece: bytes) -> bytes:
        """Return the piece, stuffed."""
        if not piece:
            return piece
        first = b"." if self._at_start and piece.startswith(b".") else b""
        self._at_start = piece.endswith(_CRLF)
        return first + piece.replace(b"\r\n.", b"\r\n..")


class LongestLine:
    """Checks the length of lines across pieces, in octets without the line end."""

    __slots__ = ("_limit", "_open")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open = 0  # octets of the unfinished last line

    def exceeds(self, piece: bytes) -> bool:
        """Say whether a line is longer than the limit."""
        first, *others = piece.split(_CRLF)
        longest = max(self._open + len(first), max(map(len, others), default=0))
        self._open = len(others[-1]) if others else self._open + len(first)
        return longest > self._limit
