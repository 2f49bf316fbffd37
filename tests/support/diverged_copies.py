"""Copies that a backup answers otherwise than the primary did, written to the ledger as the worker does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from relay.ledger import changes, divergence, divergence_groups, keys, queries
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence import DEFERRED, GIVEN_UP, RCPT, REFUSED, Answer
from relay.ledger.divergence_groups import Group
from relay.mail.reply import Reply
from relay.mail.reply_text import Known
from support import listed_copies
from support.ledger_contents import Contents
from workers.queues import failed

OURS = Known(ours=("relay.test",), server="new.test")
_MONTH = 30 * 86400.0


def refused(text: str = "550 5.1.1 no such user", stage: str = RCPT) -> Answer:
    return _answer(REFUSED, text, stage)


def deferred(text: str = "450 4.2.0 later", stage: str = RCPT) -> Answer:
    return _answer(DEFERRED, text, stage)


def given_up(text: str = "450 4.2.0 later", stage: str = RCPT) -> Answer:
    return _answer(GIVEN_UP, text, stage)


def _answer(kind: str, text: str, stage: str) -> Answer:
    return Answer(kind, stage, Reply.of(int(text[:3]), text[4:]))


class Backup:
    """One destination's copies, as its worker writes what became of them."""

    def __init__(self, contents: Contents, name: str = "new") -> None:
        self.contents = contents
        self.name = name

    def attempt(
        self, message_id: str, answers: Mapping[int, Answer], *, times: int = 1, most: int = divergence.MOST_GROUPS
    ) -> None:
        """Write what an attempt came to, so many times, as after a lost answer: recipients not named are served."""
        connection = self.contents.connection
        (envelope,) = queries.envelopes(connection, [message_id])
        assert envelope is not None
        before = CopyState.from_wire(connection.hget(keys.OWN + self.name, message_id))
        now = changes.now(connection)
        said = next(iter(answers.values())).reply.text if answers else "250 ok"
        state, noted = divergence.count(before.tried(now, said), envelope, self.name, answers, OURS)
        later = [i for i, answer in answers.items() if answer.kind == DEFERRED]
        never = [i for i, answer in answers.items() if answer.kind != DEFERRED]
        remains = replace(state.owed_by(later), job="job") if later else None
        for _ in range(times):
            with connection.pipeline(transaction=True) as pipe:
                divergence.note(pipe, self.name, envelope, before.attempts, noted, most=most)
                if never:
                    failure = state.owed_by(never)
                    failed.add_failure(
                        pipe, self.contents.queue(self.name), self.name, message_id, failure, remains, said, _MONTH
                    )
                elif remains:
                    changes.defer(pipe, self.name, {message_id: remains})
                else:
                    changes.settle(pipe, self.name, [message_id], counted=True)
                pipe.execute()

    def retry(self, message_id: str) -> None:
        """Have a failed copy tried again, as far as the claim."""
        listed_copies.retry(self.contents.connection, [message_id], self.name)
        state = CopyState.from_wire(self.contents.connection.hget(keys.FAILURE + self.name, message_id))
        assert [claim.id for claim in self.contents.claim(state.job, message_id, to=self.name)] == [message_id]

    def groups(self) -> dict[str, Group]:
        """Return the groups by their texts."""
        return {found.text: found for found in divergence_groups.groups(self.contents.connection, self.name)}

    def group(self) -> Group:
        (found,) = divergence_groups.groups(self.contents.connection, self.name)
        return found
