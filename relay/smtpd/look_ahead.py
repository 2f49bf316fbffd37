"""The commands that a client has pipelined behind its MAIL (RFC 2920), looked at before their turn.

They go ahead to a PIPELINING primary together with MAIL. Each is still processed in its turn, and by then the primary's
reply is on its way: three round trips become one. Only commands that are certain to be passed on go ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from relay.client.server_limits import server_limits
from relay.config.model import SmtpSettings
from relay.mail.recipient import Recipient
from relay.smtpd.peer import Peer
from relay.smtpd.primary_choice import PrimaryChoice
from relay.smtpd.read_buffer import ReadBuffer
from relay.smtpd.recipients import is_relayed, parse_recipient, rcpt_command
from relay.smtpd.syntax import LINE_LIMIT, SyntaxProblem, argument_text, split_command


class LookAhead:
    """What one client has sent and the command loop has not yet read."""

    __slots__ = ("_buffer", "_peer", "_settings")

    def __init__(self, buffer: ReadBuffer, peer: Peer, settings: SmtpSettings) -> None:
        self._buffer = buffer
        self._peer = peer
        self._settings = settings

    def recipient(self) -> Recipient | None:
        """Return the first recipient, if it is one that mail is relayed for."""
        if not self._buffer.data:
            return None
        with suppress(SyntaxProblem):
            for line in self._buffer.lines_ahead():
                verb, argument = split_command(line)
                if verb != b"RCPT" or len(line) > LINE_LIMIT or not line.endswith(b"\r\n"):
                    return None
                recipient = parse_recipient(argument_text(argument), self._peer.offered)
                return recipient if is_relayed(recipient, self._settings.allowed_domains) else None
        return None

    def commands(
        self, choice: PrimaryChoice, available: Mapping[str, str], behind: Recipient | None = None
    ) -> list[bytes]:
        """Return the commands to be sent ahead to a server with these extensions, up to the first that is not certain.

        ``behind``: the recipient whose RCPT goes ahead of them.
        """
        if not self._buffer.data or "PIPELINING" not in available:
            return []
        commands: list[bytes] = []
        limits, domains = server_limits(available), {behind.domain} if behind else set()
        most = min(self._settings.max_recipients, choice.primary.most_recipients, limits.recipients) - len(domains)
        with suppress(SyntaxProblem):  # replied to in its turn
            for line in self._buffer.lines_ahead():
                verb, argument = split_command(line)
                if len(line) > LINE_LIMIT or not line.endswith(b"\r\n"):
                    break
                if verb == b"DATA" and not argument and (commands or behind):
                    commands.append(b"DATA")
                    break
                if verb != b"RCPT" or len(commands) >= most:
                    break
                recipient = parse_recipient(argument_text(argument), self._peer.offered)
                domains.add(recipient.domain)
                if not is_relayed(recipient, self._settings.allowed_domains) or len(domains) > limits.domains:
                    break
                if choice.objection(recipient) is not None:
                    break
                commands.append(rcpt_command(recipient, available))
        return commands
