"""What goes on, on one line of the terminal that changes."""

from __future__ import annotations

import sys

from relay.mail.text import printable


class Progress:
    """Writes that line on standard error; without a terminal nothing."""

    def __init__(self) -> None:
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
