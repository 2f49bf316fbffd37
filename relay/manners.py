"""A client's manners: what it got wrong so far, and when that is enough.

Twenty commands that make no sense end a conversation. What a client could not know better, since it pipelines, is not
counted; what merely brings no message forward is, once there is very much of it.
"""

from __future__ import annotations

from relay.envelope import Reply

_BAD_LIMIT = 20  # commands that make no sense, then goodbye
_IDLE_LIMIT = 100  # commands that bring no message; from then on each is one that makes no sense
_EXCESS_LIMIT = 1000  # recipients over the limit that are merely told so; a client may send all it has at once


class Manners:
    """The count of one client's mistakes."""

    __slots__ = ("_excess", "_idle", "bad", "refused")

    def __init__(self) -> None:
        self.bad = 0  # commands that made no sense
        self._idle = 0  # commands since the last message
        self._excess = 0  # recipients over the limit
        self.refused = False  # the last MAIL, or what followed: a pipelining client goes on all the same

    @property
    def are_unbearable(self) -> bool:
        return self.bad >= _BAD_LIMIT

    def out_of_order(self, reply: Reply) -> Reply:
        """Count a command in the wrong place, but not what a pipelining client could not know better."""
        self.bad += not self.refused
        return reply

    def idle(self) -> None:
        """Count a command that brings no message."""
        self._idle += 1
        self.bad += self._idle > _IDLE_LIMIT

    def exceed(self) -> None:
        """Count a recipient over the limit."""
        self._excess += 1
        self.bad += self._excess > _EXCESS_LIMIT

    def bring_a_message(self) -> None:
        """Begin to count idle commands afresh."""
        self._idle = 0
