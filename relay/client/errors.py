"""What can go wrong with a server, as exceptions.

ClientError
ConnectFailed         TCP, greeting, EHLO, TLS or AUTH failed (see client.connect)
NoExchanger           a ConnectFailed: DNS has no host for the mail of the domain, or cannot tell
ConnectionGone        the server closed, or sent an unsolicited reply, before the reply that it owed
DeadlinePassed        no reply, or no room to write, in time
MalformedReply        the server sent something that is no SMTP reply
PoolExhausted         all connections are in use (see pool)
"""

from __future__ import annotations

from relay.mail.reply import Reply


class ClientError(Exception):
    """Trouble with the server: ``stage`` names the step, ``reply`` is the server's reply if there was one."""

    def __init__(self, text: str, *, stage: str, reply: Reply | None = None) -> None:
        super().__init__(f"{stage}: {text}" + (f" ({reply.text})" if reply else ""))
        self.reason = text
        self.stage = stage
        self.reply = reply


class ConnectFailed(ClientError):
    """No session was established: stage is connect, greeting, EHLO, STARTTLS, TLS or AUTH."""


class NoExchanger(ConnectFailed):
    """No host is known that takes mail for the domain. ``told`` is what our own client hears, without any name."""

    def __init__(self, text: str, told: str) -> None:
        super().__init__(text, stage="MX")
        self.told = told


class ConnectionGone(ClientError):
    """The connection is lost; the owed reply will not come."""


class DeadlinePassed(ClientError):
    """The server was silent for too long. Replies no longer match commands: only ``close`` is left."""


class MalformedReply(ClientError):
    """The server does not speak SMTP; the connection has been closed."""


def stage_of(verb: bytes) -> str:
    """Return the name of the stage for messages."""
    return "end of data" if verb == b"." else "message body" if verb == b"body" else verb.decode("ascii", "replace")
