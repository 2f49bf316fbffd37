"""A copy on its way to its backup: who is still owed it, and what was said to whom.

``read`` sorts the recipients by what their replies mean (the policy is in retry.py); nothing here does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from relay.ledger.changes import Claim
from relay.ledger.copy_state import CopyState
from relay.mail.destination import Destination
from relay.mail.record import Message
from relay.mail.reply import Reply
from workers.delivery.retry import Verdict, judge
from workers.delivery.transaction import Outcome


@dataclass(slots=True)
class Copy:
    """A claimed copy with its body. ``owed``, ``never`` and ``later`` hold indices of the envelope's recipients."""

    id: str
    message: Message
    state: CopyState
    owed: list[int]
    taken: int = 0
    never: dict[int, Reply] = field(default_factory=dict)
    later: dict[int, Reply] = field(default_factory=dict)

    @classmethod
    def of(cls, claim: Claim, message: Message, destination: Destination) -> Copy:
        """Make the copy of a claim."""
        state = begun(claim)
        envelope = message.envelope
        owed = envelope.owed_to(destination) if state.owed is None else state.owed
        return cls(claim.id, message, state, [i for i in owed if 0 <= i < len(envelope.recipients)])

    @property
    def is_touched(self) -> bool:
        """Whether some recipients have an answer that is not yet in the ledger."""
        return bool(self.taken or self.never or self.later)

    @property
    def is_refused(self) -> bool:
        """Whether every recipient that was owed this copy was refused it for good."""
        return bool(self.never) and not (self.taken or self.later or self.owed)

    def read(self, outcome: Outcome, *, soft_bounce: bool) -> Reply | None:
        """Sort the recipients that were answered; returns the reply that is about the server, if there was one."""
        server = None
        accepted = any(reply.is_positive for reply in outcome.replies.values())
        owed = [i for i in self.owed if i not in outcome.replies]
        for i, reply in outcome.replies.items():
            verdict = judge(reply, soft_bounce=soft_bounce, some_accepted=accepted)
            if verdict is Verdict.TAKEN:
                self.taken += 1
            elif verdict is Verdict.LATER:
                self.later[i] = reply
            elif verdict is Verdict.NEVER:
                self.never[i] = reply
            else:
                owed.append(i)
                if verdict is Verdict.SERVER:
                    server = reply
        self.owed = owed
        return server

    def refuse(self, reply: Reply) -> None:
        """Count everybody who is owed as refused for good."""
        self.never.update(dict.fromkeys(self.owed, reply))
        self.owed = []

    def defer(self, reply: Reply) -> None:
        """Count everybody who is owed as deferred."""
        self.later.update(dict.fromkeys(self.owed, reply))
        self.owed = []

    def take_back_refusals(self) -> None:
        """Owe it again to those who were refused: the server refuses everybody."""
        self.owed = sorted(self.never)
        self.never = {}

    def said(self, replies: dict[int, Reply]) -> str:
        """Return these replies as one line, naming the recipients where they differ."""
        texts = dict.fromkeys(reply.text for reply in replies.values())
        if len(texts) == 1:
            return next(iter(texts))
        recipients = self.message.envelope.recipients
        return "; ".join(f"<{recipients[i].address}>: {reply.text}" for i, reply in sorted(replies.items()))


def begun(claim: Claim) -> CopyState:
    """Return a claim's state, its clock started where this is the first try, or the first since an operator's retry.

    The clock of a copy that was moved here started then, later than it was accepted.
    """
    since = round(claim.accepted_at, 3)
    return claim.state if claim.state.since >= since else replace(claim.state, since=since, tries=0)
