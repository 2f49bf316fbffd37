"""A copy on its way to its backup: who is still owed it, and what was said to whom.

``read`` sorts the recipients by what their replies mean (the policy is in retry.py); nothing here does I/O.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from relay.ledger.changes import Claim
from relay.ledger.copy_state import FRESH, CopyState
from relay.mail.destination import Destination
from relay.mail.record import Message
from relay.mail.reply import Reply
from relay.trace.events import AT_ONCE, DEFERRED, DELIVERED, FAILED
from workers.delivery.retry import Meaning, judge
from workers.delivery.transaction import Outcome, Stage

_CERTAIN = (Meaning.TAKEN, Meaning.SPLIT)


@dataclass(slots=True)
class Copy:
    """A claimed copy with its body. ``owed``, ``yes``, ``never`` and ``later`` hold indices of recipients.

    ``stages`` tells of each one in ``never`` or ``later`` what that was the reply to.
    """

    id: str
    message: Message
    state: CopyState
    owed: list[int]
    yes: dict[int, Reply] = field(default_factory=dict)  # who was taken
    never: dict[int, Reply] = field(default_factory=dict)
    later: dict[int, Reply] = field(default_factory=dict)
    stages: dict[int, Stage] = field(default_factory=dict)
    uncounted: set[int] = field(
        default_factory=set
    )  # whose deferral says nothing of the copy: the server's trouble, ours
    most: int = sys.maxsize  # recipients in one transaction, as far as this server has said
    repeats: int = 0  # transactions that a reused connection did not carry through and a new one may
    doubted: Reply | None = None  # what such a connection said
    seconds: float | None = None  # from the last dot to the reply to it

    @classmethod
    def of(cls, claim: Claim, message: Message, destination: Destination) -> Copy:
        """Make the copy of a claim."""
        state, envelope = begun(claim), message.envelope
        if state.owed is None:
            return cls(claim.id, message, state, list(envelope.owed_to(destination)))
        return cls(claim.id, message, state, [i for i in state.owed if 0 <= i < len(envelope.recipients)])

    @property
    def is_touched(self) -> bool:
        """Whether some recipients have an answer that is not yet in the ledger."""
        return bool(self.yes or self.never or self.later)

    @property
    def is_refused(self) -> bool:
        """Whether every recipient that was owed this copy was refused it for good."""
        return bool(self.never) and not (self.yes or self.later or self.owed)

    @property
    def next_owed(self) -> list[int]:
        """Who is to be in the next transaction."""
        return self.owed[: self.most]

    def read(
        self, outcome: Outcome, *, soft_bounce: bool, is_doubtful: Callable[[Reply], bool] | None = None
    ) -> Reply | None:
        """Sort the recipients that were answered; returns the reply that is about the server, if there was one.

        ``is_doubtful`` says of a refusal on a reused connection whether a new one is to be asked: the recipient is
        then owed as before, and ``doubted`` is what was said.
        """
        self.doubted = None
        if not outcome.is_taken:
            return self._sort(outcome, soft_bounce, is_doubtful)
        self.yes.update(outcome.replies)
        self.owed = [i for i in self.owed if i not in outcome.replies]
        return None

    def _sort(self, outcome: Outcome, soft_bounce: bool, is_doubtful: Callable[[Reply], bool] | None) -> Reply | None:
        server = None
        accepted = any(reply.is_positive for reply in outcome.replies.values())
        owed = [i for i in self.owed if i not in outcome.replies]
        doubtful: dict[int, bool] = {}  # by code, so that many recipients are one question
        for i, reply in outcome.replies.items():
            is_asked_first = i not in outcome.accepted  # the reply is not to the message
            verdict = judge(
                reply,
                soft_bounce=soft_bounce,
                some_accepted=accepted or (is_asked_first and bool(outcome.accepted)),
            )
            if is_doubtful and verdict not in _CERTAIN and (is_asked_first or not outcome.sent):
                if reply.code not in doubtful:
                    doubtful[reply.code] = is_doubtful(reply)
                if doubtful[reply.code]:
                    owed.append(i)
                    self.doubted = reply
                    continue
            if verdict is Meaning.TAKEN:
                self.yes[i] = reply
                continue
            self.stages[i] = outcome.stage(i)
            if not is_asked_first and len(outcome.accepted) > 1 and reply.is_too_many_recipients:
                owed.append(i)  # it counts them late
                self.most = len(outcome.accepted) // 2
            elif verdict is Meaning.LATER:
                self.later[i] = reply
            elif verdict is Meaning.NEVER:
                self.never[i] = reply
            else:
                owed.append(i)
                if verdict is Meaning.SERVER:
                    server = reply
        self.owed = sorted(owed)
        return server

    def refuse(self, reply: Reply) -> None:
        """Count everybody who is owed as refused for good, by a reply of our own."""
        self.stages.update(dict.fromkeys(self.owed, Stage.OWN))
        self.never.update(dict.fromkeys(self.owed, reply))
        self.owed = []

    def defer(self, reply: Reply, *, is_own: bool = True, is_about_it: bool = True) -> None:
        """Count everybody who is owed as deferred; not ``is_own``: this is what the server has just said to them.

        Not ``is_about_it``: that is the server's trouble, or ours, and no divergence.
        """
        if not is_about_it:
            self.uncounted.update(self.owed)
        for i in self.owed:
            if is_own or i not in self.stages:
                self.stages[i] = Stage.OWN
        self.later.update(dict.fromkeys(self.owed, reply))
        self.owed = []

    def parts(self) -> list[tuple[str, int, Sequence[str], Reply]]:
        """Return what was said to whom, as the trace keeps it: who, where not all of them heard the same."""
        is_mixed = bool(self.later or self.never)
        if not is_mixed and len(found := set(self.yes.values())) == 1:
            return [(DELIVERED, len(self.yes), (), found.pop())]
        parts: list[tuple[str, int, Sequence[str], Reply]] = []
        recipients = self.message.envelope.recipients
        for verdict, replies in ((DELIVERED, self.yes), (DEFERRED, self.later), (FAILED, self.never)):
            by_reply: dict[Reply, list[int]] = {}
            for i, reply in replies.items():
                by_reply.setdefault(reply, []).append(i)
            is_told = is_mixed or len(by_reply) > 1
            for reply, some in by_reply.items():
                names = [recipients[i].address for i in some[:AT_ONCE]] if is_told else ()
                parts.append((verdict, len(some), names, reply))
        return parts

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
    if claim.state is FRESH:  # as nearly always
        return CopyState(since=since)  # in a fifth of the time that ``replace`` takes
    return claim.state if claim.state.since >= since else replace(claim.state, since=since, tries=0)
