"""What a client has heard in one transaction so far, for the trace: told once, at its end, however it ends."""

from __future__ import annotations

from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.trace import emitter, events

_MOST_REFUSED = 100  # refused recipients of one transaction that are kept: a list that is guessed at has thousands


class Replies:
    """The replies of one transaction, and where its copy was stored."""

    __slots__ = ("is_told", "mail", "rcpt", "refused", "stage", "stage_seconds")

    def __init__(self) -> None:
        self.mail: Reply | None = None
        self.rcpt: list[Reply] = []  # to the recipients that were accepted
        self.refused: list[tuple[str, Reply, bool]] = []  # address, reply, whether it was a rule of ours
        self.stage = events.NOWHERE
        self.stage_seconds = 0.0
        self.is_told = False

    def refuse(self, address: str, reply: Reply, *, is_own: bool) -> None:
        """Note a recipient that was refused."""
        if len(self.refused) < _MOST_REFUSED:
            self.refused.append((address, reply, is_own))

    def tell(
        self,
        outcome: str,
        envelope: Envelope,
        primary: str,
        reply: Reply | None,
        *,
        seconds: float = 0.0,
        refused_at: str = "",
        is_late: bool = False,
    ) -> None:
        """Tell the trace how it ended; only the first end counts."""
        trace = emitter.current
        if self.is_told or trace is None:
            return
        self.is_told = True
        is_one = len({*self.rcpt}) == 1  # to all recipients
        for event in events.received(
            outcome,
            envelope,
            self.refused,
            self.stage,
            self.stage_seconds,
            primary,
            seconds,
            reply,
            refused_at,
            self.mail,
            self.rcpt[:1] if is_one else self.rcpt,
            is_late=is_late,
        ):
            trace.note(event)
