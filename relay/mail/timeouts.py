"""How long a server may take before it answers (RFC 5321 4.5.3.2), as one value for whoever talks to it.

A host that cannot be connected to is dead, and known to be so within seconds. One that is connected may be slow on
purpose or with reason: it delays its greeting to see who cannot wait, looks names up, asks another server about the
sender, or slows strangers down. The RFC gives it minutes for that. Here it has what fits into the patience of those
who wait for us: Postfix, Exim and Sendmail wait 300 s for the reply to a MAIL, and a new session is opened within it.
"""

from __future__ import annotations

from typing import NamedTuple

MAIL_SECONDS = 270.0  # from a client's MAIL to our reply; below the 300 s of the RFC, after which it hangs up


class Timeouts(NamedTuple):
    """The longest waits for a server, in seconds."""

    connect: float  # for the connection itself: dead hosts are told by this
    greeting: float  # for the 220
    command: float  # for the reply to any command but the end of data

    @classmethod
    def of(cls, seconds: float) -> Timeouts:
        """Return the same for every step."""
        return cls(seconds, seconds, seconds)

    @property
    def session(self) -> float:
        """For the whole way to a session past EHLO, TLS and AUTH, however many steps it takes."""
        return self.connect + self.greeting + self.command
