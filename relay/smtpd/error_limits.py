"""The error limits of one client: its errors are counted, and at the limit it is disconnected.

Twenty bad commands end a session. Commands that a pipelining client sent behind a refused one count as bad only beyond
a thousand; what advances no message (NOOP, RSET, a message that is refused at its end; compare Postfix's
smtpd_junk_command_limit) only beyond a hundred, and one of these is forgotten every five seconds. An accepted message
resets both counts. The log gets at most a hundred lines about one client and message; one more line gives the number of
those left out.
"""

from __future__ import annotations

import time

_BAD_LIMIT = 20  # bad commands, then the client is disconnected
_IDLE_LIMIT = 100  # commands that advance no message; each further one counts as bad
_FORGIVEN = 5.0  # seconds, after which one of those is forgotten: a monitor may send NOOP now and then for ever
_EXCESS_LIMIT = 1000  # refused recipients and commands behind a refused one; each further one counts as bad
_LINES = 100  # log lines about one client and message


class ErrorLimits:
    """Counts the errors of one client."""

    __slots__ = ("_excess", "_idle", "_idle_at", "bad", "lines")

    def __init__(self) -> None:
        self.bad = 0  # bad commands
        self._idle = 0.0  # commands that advanced no message since the last accepted one, less what is forgotten
        self._idle_at = 0.0
        self._excess = 0  # refused recipients, and commands behind a refused one, since the last accepted message
        self.lines = 0  # log lines, written and left out

    @property
    def are_unbearable(self) -> bool:
        return self.bad >= _BAD_LIMIT

    def idle(self) -> None:
        """Count a command that advances no message."""
        now = time.monotonic()
        self._idle = max(0.0, self._idle - (now - self._idle_at) / _FORGIVEN) + 1
        self._idle_at = now
        self.bad += self._idle > _IDLE_LIMIT

    def exceed(self) -> None:
        """Count a refused recipient, or a command behind one that was refused."""
        self._excess += 1
        self.bad += self._excess > _EXCESS_LIMIT

    def bring_a_message(self) -> None:
        """Reset the counts after an accepted message; bad commands stay counted."""
        self._idle = 0.0
        self._excess = 0

    def may_be_logged(self) -> bool:
        """Count a log line about this client; returns whether it is to be written."""
        self.lines += 1
        return self.lines <= _LINES

    def unlogged(self) -> int:
        """Return how many log lines were left out, and reset the count."""
        lines, self.lines = self.lines, 0
        return max(0, lines - _LINES)
