"""What the mail log and the trace are told of one client's transactions: refusals, and each end, once.

A client that is refused for ever fills neither: beyond a hundred lines its refusals are only counted (error_limits.py),
and the trace is told of a transaction without a message only where the log was.
"""

from __future__ import annotations

from relay import maillog
from relay.mail.reply import Reply
from relay.smtpd.context import Context
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.open_envelope import OpenEnvelope
from relay.smtpd.peer import Peer
from relay.smtpd.replies import Replies
from relay.trace import emitter, events


class TransactionReport:
    """Tells of the transactions of one client; ``replies`` are those of the current one."""

    def __init__(self, context: Context, peer: Peer, error_limits: ErrorLimits) -> None:
        self.replies = Replies()
        self._context = context
        self._peer = peer
        self._error_limits = error_limits
        self._was_logged = False  # a refusal of this transaction

    def command_refused(self, command: str, reply: Reply, envelope: OpenEnvelope, *, is_own: bool = False) -> None:
        """Tell of a MAIL or DATA that was refused, and with it the transaction; ``is_own``: by a rule of ours."""
        self._log(command, reply)
        if self._was_logged:
            envelope.id = self._context.ids.next()
            outcome = events.OWN if is_own else events.REFUSED
            self._tell(self.replies, outcome, envelope, reply, refused_at=command)
            self.replies, self._was_logged = Replies(), False

    def recipient_refused(self, address: str, reply: Reply, *, is_own: bool) -> None:
        """Tell of a recipient that was refused; the trace hears of it at the end of the transaction."""
        self.replies.refuse(address, reply, is_own=is_own)
        self._log(f"RCPT <{address}>", reply)

    def end(self, envelope: OpenEnvelope, *, in_body: bool) -> None:
        """End a transaction: tell of it, where no end of a message was told of."""
        replies, was_logged = self.replies, self._was_logged
        self.replies, self._was_logged = Replies(), False
        if replies.is_told:
            return
        if in_body:
            self._tell(replies, events.BROKEN_OFF, envelope, None)
        elif replies.refused and was_logged:
            envelope.id = self._context.ids.next()
            self._tell(replies, events.REFUSED, envelope, replies.refused[-1][1], refused_at="RCPT")

    def log_the_rest(self) -> None:
        """Log how many refusals have no line of their own."""
        if count := self._error_limits.unlogged():
            maillog.commands_refused(self._peer.address, count)

    def _log(self, command: str, reply: Reply) -> None:
        if self._error_limits.may_be_logged():
            self._was_logged = True
            maillog.command_refused(self._peer.address, command, reply)

    def _tell(
        self, replies: Replies, outcome: str, envelope: OpenEnvelope, reply: Reply | None, *, refused_at: str = ""
    ) -> None:
        if emitter.current is not None:
            sealed, primary = envelope.sealed(self._context.staging.now()), envelope.choice.answering
            replies.tell(outcome, sealed, primary, reply, refused_at=refused_at)
