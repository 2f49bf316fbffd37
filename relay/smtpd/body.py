"""A message on its way in: each piece of it is looked at, passed on to the primary, and kept for the copies.

A message that breaks a rule is given up at once at the primary, by a close of the connection, since parts of it may
be there already; what still comes of it is dropped, and ``refusal`` is what the client hears at its end.
"""

from __future__ import annotations

import asyncio
import re

from relay.config.model import SmtpSettings
from relay.mail import headers
from relay.mail.reply import Reply
from relay.smtpd.end_of_data import Pace
from relay.smtpd.line_endings import LineEnds, LongestLine, Stuffing
from relay.smtpd.primary import PrimaryTransaction
from relay.smtpd.shared_counters import ProcessCounters

FULL = Reply.of(452, "4.3.1 Too much mail at once, try again later")
TOO_LARGE = Reply.of(552, "5.3.4 Message is larger than this relay takes")
_BARE_NEWLINE = Reply.of(550, "5.6.11 A line must end with CRLF: this message has a bare CR or LF")
_LONG_LINE = Reply.of(554, "5.6.0 A line of the message is longer than this relay takes")
_HEADER_BYTES = Reply.of(552, "5.3.4 The header is larger than this relay takes")
_HEADERS = Reply.of(552, "5.3.4 The message has more header fields than this relay takes")
_LOOP = Reply.of(554, "5.4.6 Too many hops, mail forwarding loop")
_AT_ONCE = 64 << 10  # octets of a body that wait for the dot
_HEADER_LOOK = 1 << 20  # octets of a header that are looked at where the settings have no limit
_LONGEST_NAME = 1 << 10  # octets of a line that show whether it is a field
LARGE = 256 << 10  # octets; work on bodies over this is a thread's
# How a body begins that would go on with our Received line at whoever undoes the dot-stuffing, or drops NULs.
_CONTINUES = re.compile(rb"\0*\.?\0*[ \t\v\f]")
_MAY_CONTINUE = re.compile(rb"\0*\.?\0*")
_MOST_NULS = 1 << 10  # then no more is awaited before it is told
_OWN_LINES_LIMIT = 5  # Received lines of our own: a forward that lawfully comes back passes


class IncomingBody:
    """The body of one message, dot-stuffed when it comes by DATA and not when by BDAT (``stuffed``)."""

    __slots__ = (
        "_begun",
        "_counters",
        "_ends",
        "_front",
        "_kept",
        "_last",
        "_lines",
        "_octets",
        "_settings",
        "_stuffing",
        "_transaction",
        "pace",
        "refusal",
    )

    def __init__(
        self,
        settings: SmtpSettings,
        counters: ProcessCounters,
        transaction: PrimaryTransaction,
        trace: bytes,
        *,
        stuffed: bool,
        crlf_only: bool,
    ) -> None:
        self._settings = settings
        self._counters = counters
        self._transaction = transaction
        self._ends = LineEnds(refuse=crlf_only, stuffed=stuffed)
        self._stuffing = None if stuffed else Stuffing()
        self._lines = LongestLine(settings.max_line_bytes) if settings.max_line_bytes else None
        self._kept: list[bytes] = []  # what it has; in blocks, since a piece may be an octet and its object fifty
        self._last = trace  # what the primary has not got yet: the end of the body leaves with the dot, in one write
        self._front = b""  # of the body, while it cannot be told how it begins
        self._begun = False
        self._octets = 0  # as counted in our numbers
        self.refusal: Reply | None = None
        self.pace = Pace(settings.idle_timeout, settings.min_data_rate)

    async def take(self, piece: bytes) -> None:
        """Take a piece as the client sent it."""
        if self.refusal is None:
            await self._pass_on(self._ends.feed(piece))

    async def complete(self) -> bytes:
        """Take the end; returns the whole body in wire form, our Received line in front."""
        if self._stuffing is not None and self.refusal is None:
            await self._pass_on(self._ends.finish())
        if not self._begun and self.refusal is None:
            await self._pass_on(b"", is_last=True)
        self._transaction.hold(self._last)
        parts, self._kept = (*self._kept, self._last), []
        body = b"".join(parts) if self._octets <= LARGE else await asyncio.to_thread(b"".join, parts)
        if self.refusal is None:
            self.refusal = await self._fault_of_header(body)
        if self.refusal is not None:
            self._give_up()
        return body

    def close(self) -> None:
        """Have the message counted no more."""
        self._counters.add_octets(-self._octets)
        self._octets = 0
        self._kept = []

    async def _pass_on(self, piece: bytes, *, is_last: bool = False) -> None:
        if self._stuffing is not None:
            piece = self._stuffing.feed(piece)
        if not self._begun:
            piece = self._beginning(piece, is_last=is_last)
        self.refusal = _BARE_NEWLINE if self._ends.refused else self._too_much(piece)
        if self.refusal is None and piece:
            if len(self._last) + len(piece) <= _AT_ONCE:
                self._last += piece
            else:
                self._kept.append(self._last)
                self.refusal = await self._transaction.write([self._last])
                self._last = piece
        if self.refusal is not None:
            self._give_up()

    def _beginning(self, piece: bytes, *, is_last: bool = False) -> bytes:
        """Return the first octets of the body, below an empty line where no header begins like that.

        They would go on with our Received line. Postfix puts an empty line there, too.
        """
        piece, self._front = self._front + piece, b""
        undecided = _MAY_CONTINUE.fullmatch(piece) is not None
        if undecided and len(piece) < _MOST_NULS and not is_last:
            self._front = piece
            return b""
        self._begun = True
        return b"\r\n" + piece if piece and (undecided or _CONTINUES.match(piece)) else piece

    def _give_up(self) -> None:
        self._transaction.abandon()
        self._kept, self._last = [], b""

    def _too_much(self, piece: bytes) -> Reply | None:
        """Count what is kept of the message; returns the refusal when that is over a limit."""
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

    async def _fault_of_header(self, body: bytes) -> Reply | None:
        # A line more than the limit is enough to know: the header of a message without an empty line is all of it.
        block = headers.header_block(body, 0, (self._settings.max_header_bytes or _HEADER_LOOK) + _LONGEST_NAME)
        fault = self._fault_of_block(block)
        if fault is not None:  # looked at closely only when it matters
            fault = self._fault_of_block(await headers.fields_only(block))
        return fault

    def _fault_of_block(self, block: bytes) -> Reply | None:
        settings = self._settings
        if settings.max_header_bytes and len(block) > settings.max_header_bytes:
            return _HEADER_BYTES
        if headers.count_fields(block) - 1 > settings.max_headers:  # one is ours
            return _HEADERS
        hops, own = headers.count_hops(block, settings.domain)
        if hops - 1 > settings.max_hops or own - 1 > _OWN_LINES_LIMIT:
            return _LOOP
        return None
