"""The body of a message while it is received: each piece is checked, passed on to the primary and kept for the copies.

When a message breaks a rule, the connection to the primary is closed at once, since the primary may have parts of the
message already. The rest of the body is read and dropped, and the client gets ``refusal`` as the reply to its end.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from relay.config.model import SmtpSettings
from relay.mail import headers
from relay.mail.reply import Reply
from relay.smtpd.end_of_data import Pace
from relay.smtpd.line_endings import LineEnds, LongestLine, Stuffing
from relay.smtpd.shared_counters import ProcessCounters

if TYPE_CHECKING:
    from relay.smtpd.forked_transaction import OpenTransaction

FULL = Reply.of(452, "4.3.1 Too much mail at once, try again later")
TOO_LARGE = Reply.of(552, "5.3.4 Message is larger than this relay takes")
_BARE_NEWLINE = Reply.of(550, "5.6.11 A line must end with CRLF: this message has a bare CR or LF")
_LONG_LINE = Reply.of(554, "5.6.0 A line of the message is longer than this relay takes")
_HEADER_BYTES = Reply.of(552, "5.3.4 The header is larger than this relay takes")
_HEADERS = Reply.of(552, "5.3.4 The message has more header fields than this relay takes")
_LOOP = Reply.of(554, "5.4.6 Too many hops, mail forwarding loop")
_AT_ONCE = 64 << 10  # octets of a body that wait for the dot
_HEADER_LOOK = 1 << 20  # octets of a header that are checked when the settings have no limit
_LONGEST_NAME = 1 << 10  # octets of a line that show whether it is a field
LARGE = 256 << 10  # octets; work on larger bodies runs in a thread
# A body that begins like this would continue our Received line at a server that undoes dot-stuffing or drops NULs.
_CONTINUES = re.compile(rb"\0*\.?\0*[ \t\v\f]")
_MAY_CONTINUE = re.compile(rb"\0*\.?\0*")
_MOST_NULS = 1 << 10  # octets; after these, the beginning is judged as it is
_OWN_LINES_LIMIT = 5  # Received lines of our own: a forward that lawfully comes back passes


class IncomingBody:
    """The body of one message, dot-stuffed when it comes by DATA and not when by BDAT (``stuffed``)."""

    __slots__ = (
        "_begun",
        "_counters",
        "_due",
        "_ends",
        "_front",
        "_kept",
        "_last",
        "_lines",
        "_octets",
        "_settings",
        "_stuffing",
        "is_by_primary",
        "pace",
        "refusal",
        "transaction",
    )

    def __init__(
        self,
        settings: SmtpSettings,
        counters: ProcessCounters,
        transaction: OpenTransaction,
        trace: bytes,
        *,
        stuffed: bool,
        crlf_only: bool,
    ) -> None:
        self._settings = settings
        self._counters = counters
        self.transaction = transaction  # at the primary
        self._ends = LineEnds(refuse=crlf_only, stuffed=stuffed)
        self._stuffing = None if stuffed else Stuffing()
        self._lines = LongestLine(settings.max_line_bytes) if settings.max_line_bytes else None
        self._kept: list[bytes] = []  # sent to the primary; in blocks: an object of one octet would take fifty
        self._due = b""  # the part of it that is still to be sent
        self._last = trace  # not yet sent to the primary: the end of the body leaves with the dot, in one write
        self._front = b""  # the first octets, until it is certain how the body begins
        self._begun = False
        self._octets = 0  # counted in the counters of this process
        self.refusal: Reply | None = None
        self.is_by_primary = False  # the refusal, and not by a rule of the relay
        self.pace = Pace(settings.idle_timeout, settings.min_data_rate)

    def take(self, piece: bytes) -> bool:
        """Take a piece as the client sent it; after a ``refusal`` it is dropped. Returns whether to ``pass_on``."""
        if self.refusal is None:
            self._add(self._ends.feed(piece))
        return bool(self._due)

    async def pass_on(self) -> None:
        """Send the primary what is due, which may have to wait."""
        due, self._due = self._due, b""
        refusal = await self.transaction.write([due])
        if refusal is not None:
            self.refusal, self.is_by_primary = refusal, True
            self._give_up()

    async def complete(self) -> bytes:
        """End the body; returns all of it in wire form, below our Received line. ``refusal`` is final now."""
        if self._stuffing is not None and self.refusal is None:
            self._add(self._ends.finish())
        if not self._begun and self.refusal is None:
            self._add(b"", is_last=True)
        if self._due:
            await self.pass_on()
        self.transaction.hold(self._last)
        parts, self._kept = (*self._kept, self._last), []
        body = b"".join(parts) if self._octets <= LARGE else await asyncio.to_thread(b"".join, parts)
        if self.refusal is None:
            # One line beyond the limit is enough: in a message without an empty line, everything is header.
            most = (self._settings.max_header_bytes or _HEADER_LOOK) + _LONGEST_NAME
            block = headers.header_block(body, 0, most)
            if self._fault_of_block(block) is not None:  # only now is it worth separating the fields from the body
                self.refusal = self._fault_of_block(await headers.fields_only(block))
        if self.refusal is not None:
            self._give_up()
        return body

    def close(self) -> None:
        """Remove the message from the counters of this process, and free its body."""
        self._counters.add_octets(-self._octets)
        self._octets = 0
        self._kept = []

    def _add(self, piece: bytes, *, is_last: bool = False) -> None:
        if self._stuffing is not None:
            piece = self._stuffing.feed(piece)
        if not self._begun:
            if piece[:1].isalnum() and not self._front:
                self._begun = True  # with a field, as nearly always
            else:
                piece = self._beginning(piece, is_last=is_last)
        self.refusal = _BARE_NEWLINE if self._ends.refused else self._too_much(piece)
        if self.refusal is None and piece:
            if len(self._last) + len(piece) <= _AT_ONCE:
                self._last += piece
            else:
                self._kept.append(self._last)
                self._due, self._last = self._last, piece
        if self.refusal is not None:
            self._give_up()

    def _beginning(self, piece: bytes, *, is_last: bool = False) -> bytes:
        """Return the first octets of the body, or b"" while they are undecided.

        An empty line goes in front of octets that would otherwise continue our Received line, as in Postfix.
        """
        piece, self._front = self._front + piece, b""
        undecided = _MAY_CONTINUE.fullmatch(piece) is not None
        if undecided and len(piece) < _MOST_NULS and not is_last:
            self._front = piece
            return b""
        self._begun = True
        return b"\r\n" + piece if piece and (undecided or _CONTINUES.match(piece)) else piece

    def _give_up(self) -> None:
        self.transaction.abandon()
        self._kept, self._due, self._last = [], b"", b""

    def _too_much(self, piece: bytes) -> Reply | None:
        """Count a piece; returns the refusal when the message exceeds a limit."""
        octets, limit = len(piece), self._settings.max_message_bytes
        if limit and self._octets + octets > limit:
            return TOO_LARGE
        if self._lines is not None and self._lines.exceeds(piece):
            return _LONG_LINE
        if self._counters.octets + octets > self._settings.max_bytes_in_flight:
            return FULL
        self._octets += octets
        self._counters.add_octets(octets)
        return None

    def _fault_of_block(self, block: bytes) -> Reply | None:
        settings = self._settings
        if settings.max_header_bytes and len(block) > settings.max_header_bytes:
            return _HEADER_BYTES
        if headers.count_fields(block) - 1 > settings.max_headers:  # not counting our Received field
            return _HEADERS
        # Our Received field is one of both.
        return (
            _LOOP if headers.has_looped(block, settings.domain, settings.max_hops + 1, _OWN_LINES_LIMIT + 1) else None
        )
