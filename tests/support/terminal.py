"""A command of the product on a terminal, with somebody who types, and who may press Ctrl-C at what is shown."""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl

import pytest

from support import forked
from support.product import Product


@dataclass(frozen=True, slots=True)
class Seen:
    """What was to be seen, and how it ended."""

    text: str
    status: int


def typed(instance: Product, *words: str, answer: str = "", columns: int = 60, interrupt_at: str = "") -> Seen:
    """Run a command on a terminal; with ``interrupt_at``, a pattern, press Ctrl-C once as soon as that is shown."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "r+b", buffering=0) as terminal:
        process = forked.start(
            ["smtp-dup", *words],
            env={**instance.environment, "TERM": "xterm"},
            cwd=instance.directory,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
    try:
        os.write(ours, answer.encode())
        seen = b""
        with suppress(OSError):  # EIO: the other end is closed
            while chunk := os.read(ours, 4096):
                seen += chunk
                if interrupt_at and re.search(interrupt_at.encode(), seen):
                    process.send_signal(signal.SIGINT)
                    interrupt_at = ""
        return Seen(seen.decode(), process.wait(20))
    finally:
        process.end()  # a test whose time is over leaves nothing that another one is blamed for
        os.close(ours)


def on_terminal(instance: Product, *words: str, answer: str = "", columns: int = 60) -> str:
    """Run a command on a terminal; return what was to be seen."""
    return typed(instance, *words, answer=answer, columns=columns).text


class Terminal:
    """A standard output that is a terminal of some width, in memory."""

    encoding = "utf-8"

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.text = ""
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", self)

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.text += "".join(lines)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True
