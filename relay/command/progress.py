"""What goes on, on one line of the terminal that changes, and what has come of it, for people or as JSON."""

from __future__ import annotations

import sys

from relay.command.output import Output
from relay.mail.text import printable


class Progress:
    """One line on the terminal that changes; without a terminal nothing."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._shown = ""

    def __call__(self, text: str) -> None:
        if text != self._shown and sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{printable(text)}")
            sys.stderr.flush()
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = ""

    def end(self, text: str) -> None:
        """Say how a step has ended."""
        self.clear()
        say(self._out, text, {"kind": "prepared"})


def say(out: Output, text: str, value: dict[str, object]) -> None:
    """Write a line, or the object that says the same."""
    if out.as_json:
        out.object(value)
    else:
        out.line(text)
