"""The error limits of one client: what it got wrong so far, and when it is disconnected for that.

Twenty commands that make no sense end a session. What a client could not know better, since it pipelines, is not
counted at first; what merely brings no message forward is, once there is very much of it (smtpd_junk_command_limit is
Postfix's word for it), and at a slow pace it is forgiven. An accepted message resets the counts. The log has so
many lines about one client and message; then one line says how many more there were.
"""

from __future__ import annotations

import time

_BAD_LIMIT = 20  # commands that make no sense, then the client is disconnected
_IDLE_LIMIT = 100  # commands that bring no message; from then on each is one that makes no sense
_FORGIVEN = 5.0  # seconds, after which one of those is forgotten: who asks now and then how we are may go on for ever
_EXCESS_LIMIT = 1000  # refused recipients, and commands behind a refused one; a client may send all it has at once
_LINES = 100  # of the log


class ErrorLimits:
    """Counts the errors of one client."""

    __slots__ = ("_excess", "_idle", "_idle_at", "_lines", "bad")

    def __init__(self) -> None:
        self.bad = 0  # commands that made no sense
        self._idle = 0.0  # commands since the last message
        self._idle_at = 0.0
        self._excess = 0  # refused recipients since then, and what was pipelined behind a refusal
        self._lines = 0  # that the log has, or would have

    @property
    def are_unbearable(self) -> bool:
        return self.bad >= _BAD_LIMIT

    def idle(self) -> None:
        """Count a command that brings no message."""
        now = time.monotonic()
        self._idle = max(0.0, self._idle - (now - self._idle_at) / _FORGIVEN) + 1
        self._idle_at = now
        self.bad += self._idle > _IDLE_LIMIT

    def exceed(self) -> None:
        """Count a refused recipient, or a command behind one that was refused."""
        self._excess += 1
        self.bad += self._excess > _EXCESS_LIMIT

    def bring_a_message(self) -> None:
        """Begin to count afresh."""
        self._idle = 0.0
        self._excess = 0

    def may_be_logged(self) -> bool:
        """Count a line of the log about this client; says whether it is written."""
        self._lines += 1
        return self._lines <= _LINES

    def unlogged(self) -> int:
        """Return how many lines were not written, and begin afresh."""
        lines, self._lines = self._lines, 0
        return max(0, lines - _LINES)
