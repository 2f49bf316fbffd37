"""What a server refused and took lately, to find mail that is unlike what it refuses.

A server that refuses everything and one that refuses many messages in a row (mailboxes that it lacks, one sender that
it has listed) say the same, until it is asked about something else: another sender, another domain, a mailbox that took
mail before. Only memory: bounded, forgotten with the process.
"""

from __future__ import annotations

from collections.abc import Iterable

from relay.mail.envelope import Envelope
from workers.delivery.copy import Copy
from workers.delivery.transaction import Outcome

_MOST = 5000  # addresses of each kind


class RefusalMemory:
    """The refusals of one destination."""

    def __init__(self) -> None:
        self._taken: dict[str, None] = {}  # recipients that were sent mail, the oldest first
        self._refused: dict[str, None] = {}  # recipients
        self._domains: dict[str, None] = {}  # since it last took anything, as the next two
        self._senders: dict[str, None] = {}
        self._is_of_senders = False

    def took(self, copy: Copy, outcome: Outcome) -> None:
        """Note a message that was taken for some recipients."""
        recipients = copy.message.envelope.recipients
        for i, reply in outcome.replies.items():
            if reply.is_positive:
                address = recipients[i].address
                self._refused.pop(address, None)
                self._taken.pop(address, None)
                _remember(self._taken, (address,))
        if self._senders:
            self._domains.clear()
            self._senders.clear()
            self._is_of_senders = False

    def refused(self, copy: Copy, outcome: Outcome) -> None:
        """Note a message that was refused to all."""
        envelope = copy.message.envelope
        _remember(self._senders, [envelope.sender])
        if not outcome.is_begun:
            self._is_of_senders = True
            return
        recipients = [envelope.recipients[i] for i in copy.never]
        _remember(self._refused, [recipient.address for recipient in recipients])
        _remember(self._domains, [recipient.domain for recipient in recipients])

    def troubled(self, copy: Copy) -> None:
        """Note a message with which there was trouble of another kind."""
        envelope = copy.message.envelope
        _remember(self._senders, [envelope.sender])
        recipients = [envelope.recipients[i] for i in copy.next_owed]
        _remember(self._refused, [recipient.address for recipient in recipients])
        _remember(self._domains, [recipient.domain for recipient in recipients])

    def likeness(self, envelope: Envelope, *, tried: bool) -> int:
        """Return how much a message is like what was refused; ``tried``: it had no success before."""
        recipients = envelope.recipients
        likeness = 4 * all(recipient.address in self._refused for recipient in recipients)
        likeness += 2 * all(recipient.domain in self._domains for recipient in recipients)
        likeness += 2 * tried
        if envelope.sender in self._senders:
            likeness += 6 if self._is_of_senders else 1
        return likeness - 3 * any(recipient.address in self._taken for recipient in recipients)


def _remember(known: dict[str, None], addresses: Iterable[str]) -> None:
    for address in addresses:
        known[address] = None
    while len(known) > _MOST:
        del known[next(iter(known))]
