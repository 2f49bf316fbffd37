"""The recipients of the mail that the trace remembers: whom the primary took, and whom it refused as unknown to it.

Everything since a moment is read, the newest first, so it takes a while where there is much; what is found is bounded,
and the newest win. Addresses that are kept hashed are counted, those that are not kept are not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from relay.mail.refusal_class import DISABLED, NO_MAILBOX, classify
from relay.mail.reply import Reply
from relay.trace.events import ACCEPTED, Event, More, Received
from relay.trace.privacy import is_hashed

MOST_ACCEPTED, MOST_REFUSED = 200_000, 5000


@dataclass(slots=True)
class SeenRecipients:
    """Recipients as they were given, each once; ``hashed`` is how many the trace has under a pseudonym alone."""

    accepted: dict[str, None] = field(default_factory=dict)
    refused: dict[str, None] = field(default_factory=dict)
    hashed: int = 0
    is_cut: bool = False  # there were more
    _more: dict[str, list[str]] = field(default_factory=dict)  # of messages with very many, by their ids

    def take(self, event: Event) -> None:
        """Take an event; further recipients of a message come before the message."""
        if isinstance(event, More):
            self._more.setdefault(event.id, []).extend(event.recipients)
        elif isinstance(event, Received):
            if event.outcome == ACCEPTED:
                self.add_accepted(event.recipients)
                self.add_accepted(self._more.pop(event.id, ()))
            self.add_refused(one.recipient for one in event.refused if not one.is_own and _is_unknown(one.reply))

    def add_accepted(self, addresses: Iterable[str]) -> None:
        self._add(self.accepted, addresses, MOST_ACCEPTED)

    def add_refused(self, addresses: Iterable[str]) -> None:
        self._add(self.refused, addresses, MOST_REFUSED)

    def _add(self, found: dict[str, None], addresses: Iterable[str], most: int) -> None:
        for address in addresses:
            if is_hashed(address):
                self.hashed += 1
            elif address in found:
                continue
            elif len(found) < most:
                found[address] = None
            else:
                self.is_cut = True


def _is_unknown(reply: str) -> bool:
    """Say whether a refusal is about the mailbox: what is about the client or its message says nothing of it."""
    if not reply.startswith("5") or not reply[:3].isdigit():
        return False
    said = Reply.of(int(reply[:3]), reply[4:])
    return classify(said.code, said.status, reply.lower()) in {NO_MAILBOX, DISABLED}
