"""Questions to whoever sits at the terminal; without one, a command line must have said it."""

from __future__ import annotations

import sys

from relay.command.exit_status import Misuse


def ask(question: str) -> bool:
    """Ask at the terminal. Raises Misuse where nobody is there."""
    if not sys.stdin or not sys.stdin.isatty():
        raise Misuse("nobody to ask: say --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
