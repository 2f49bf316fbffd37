"""The time-outs of a session with a server (RFC 5321 4.5.3.2), as one value.

A host that does not accept a connection within seconds is dead. A connected server may be slow on purpose: it delays
its greeting to detect spammers, does DNS look-ups and sender call-outs, or tarpits. The RFC allows minutes for that.
Here the limit is what the relay's own clients allow: Postfix, Exim and Sendmail wait 300 s for the reply to MAIL, and
within that time a new session with the primary may have to be opened.
"""

from __future__ import annotations

from typing import NamedTuple

MAIL_SECONDS = 270.0  # from a client's MAIL to the reply; below the RFC's 300 s, after which the client gives up


class Timeouts(NamedTuple):
    """The longest waits for a server, in seconds."""

    connect: float  # for the TCP connection: detects dead hosts
    greeting: float  # for the 220
    command: float  # for the reply to any command except the end of data

    @classmethod
    def of(cls, seconds: float) -> Timeouts:
        """Return time-outs with the same value for every step."""
        return cls(seconds, seconds, seconds)

    @property
    def session(self) -> float:
        """The limit of the whole handshake: connect, greeting, EHLO, TLS and AUTH together."""
        return self.connect + self.greeting + self.command
