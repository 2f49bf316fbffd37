"""The exit statuses, the same for every command, and the exceptions that end with each.

A Trouble's text is one line for the operator, which says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

WELL, NO, USAGE, CANNOT_SAY = range(4)
INTERRUPTED = 130  # as a shell reports SIGINT
UNREAD = 141  # as a shell reports SIGPIPE: whoever read our output has gone

MEANINGS = {
    WELL: "well: done, found, ready",
    NO: "no: something failed, is not there, or is not ready",
    USAGE: "the command line or the settings cannot be used; nothing was done",
    CANNOT_SAY: "cannot say: Redis is away or does not answer",
    INTERRUPTED: "ended by Ctrl-C",
    UNREAD: "whoever read the output has gone, as with `| head`",
}
IN_A_LINE = "Exit status: 0 well, 1 no, 2 usage or settings, 3 cannot say (Redis away)."

T = TypeVar("T")


class Trouble(Exception):
    """What keeps a command from doing its work."""

    status = NO


class Misuse(Trouble):
    """A command line that cannot be meant."""

    status = USAGE


class CannotSay(Trouble):
    """Redis is away or does not answer."""

    status = CANNOT_SAY


def read_flag(flag: str, read: Callable[[str], T], text: str) -> T:
    """Return the value of a flag, which ``read`` makes of its text. Raises Misuse."""
    try:
        return read(text)
    except ValueError as error:
        raise Misuse(f"{flag}: {error}") from None
