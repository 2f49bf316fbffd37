"""What a ScriptedServer has been told: connections, and the transactions on them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TRACE = re.compile(
    rb"(?:(?:Received|Return-Path|Delivered-To|X-Original-To):[^\r\n]*\r?\n(?:[ \t][^\r\n]*\r?\n)*)*", re.IGNORECASE
)


@dataclass
class Transaction:
    """One MAIL with what followed. ``wire`` is the body as received, dot-stuffed, without the end-of-data line."""

    sender: str
    parameters: tuple[str, ...] = ()
    recipients: list[str] = field(default_factory=list)
    recipient_parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    xforward: dict[str, str] = field(default_factory=dict)
    wire: bytes = b""
    replies: list[str] = field(default_factory=list)  # after the dot; one, or with LMTP one per recipient
    accepted: bool = False  # after the dot, for at least one recipient
    connection: int = 0  # its index in ``ScriptedServer.connections``

    @property
    def body(self) -> bytes:
        """The message as it was before dot-stuffing."""
        return re.sub(rb"(\A|\r\n)\.", rb"\1", self.wire)

    @property
    def content(self) -> bytes:
        """The message without the trace lines (Received, Return-Path...) on top."""
        return self.body[_TRACE.match(self.body).end() :]

    @property
    def trace(self) -> bytes:
        """The trace lines on top."""
        return self.body[: len(self.body) - len(self.content)]

    def header(self, name: str) -> str | None:
        """Return the first header of this name, unfolded, or None."""
        head = self.body.partition(b"\r\n\r\n")[0] + b"\r\n"
        found = re.search(
            rb"^%s:[ \t]*(.*?)\r\n(?![ \t])" % re.escape(name.encode()), head, re.IGNORECASE | re.DOTALL | re.MULTILINE
        )
        return re.sub(rb"\r\n", b"", found[1]).decode("utf-8", "surrogateescape") if found else None


@dataclass
class Connection:
    """What one client said: ``received`` raw, ``commands`` line by line, its transactions, and how it ended."""

    index: int
    received: bytearray = field(default_factory=bytearray)
    sent: bytearray = field(default_factory=bytearray)
    commands: list[str] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    helo: str = ""
    tls: bool = False
    login: tuple[str, str] | None = None
    pipelined: bool = False  # something came before the reply to the command in front of it
    behind_dots: int = 0  # how often something came before the reply to a dot
    bare_line_ends: bool = False
    closed: str = ""  # "quit", "eof" (by the client without QUIT), "script", "stopped"; "" while it is open

    @property
    def verbs(self) -> list[str]:
        return [command.split(" ")[0].upper() for command in self.commands]
