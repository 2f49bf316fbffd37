"""One reason in full: whom it concerns, and messages as examples with what both servers said of each.

A group keeps the ids of its first and last messages. What they are is read from the ledger while a copy is there, and
from the trace where that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relay.cockpit.divergence import endings
from relay.cockpit.formatting import count, octets, span
from relay.config.model import Settings
from relay.ledger import changes, divergence_groups, keys, queries
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence_groups import Group
from relay.mail.envelope import Envelope
from relay.trace import files
from relay.trace.events import DELIVERED, Tried
from relay.trace.life import MessageLife
from relay.trace.lookup import Unseen, lives
from relay.trace.remote_lookup import OtherHosts

TOP = 20  # recipients and domains that are named
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One message of a group: what it is, and what each of both servers said of it, as far as that is known.

    ``client`` is the address that it came from, ``received_at`` in seconds since the epoch, ``size`` in octets: "" and
    None where neither the ledger nor the trace has them any more. ``attempts`` are those at the backup.
    """

    id: str
    at: float
    sender: str
    recipients: tuple[str, ...]
    client: str
    received_at: float | None
    size: int | None
    attempts: int
    primary: str
    backup: str
    stands: str  # "waits", "failed", or "gone": delivered, dropped or moved since

    def origin(self, now: float) -> str:
        """Return in words what is known of where it comes from: "1.2 KB from 192.0.2.1, 2 d 4 h old, 3 attempts"."""
        size = octets(self.size) if self.size is not None else ""
        client = f"from {self.client}" if self.client else ""
        age = f"{span(now - self.received_at)} old" if self.received_at is not None else ""
        attempts = count(self.attempts, "attempt") if self.attempts else ""
        return ", ".join(filter(None, (" ".join(filter(None, (size, client))), age, attempts)))


@dataclass(frozen=True, slots=True)
class GroupDetails:
    """All that is known of one reason; ``more_whom`` and ``more_domains`` are recipients that are not named."""

    now: float
    examples: Sequence[Example]
    whom: Sequence[tuple[str, int]]
    more_whom: int
    domains: Sequence[tuple[str, int]]
    more_domains: int
    reopened: str
    endings: str


def details(connection: Any, settings: Settings, group: Group) -> GroupDetails:
    """Return what is known of a reason; the primary's words are in the trace. Raises RedisError."""
    now = changes.now(connection)
    whom = divergence_groups.whom(connection, group.destination, group.key, TOP)
    domains = sorted(group.domains.items(), key=lambda one: (-one[1], one[0]))
    return GroupDetails(
        now,
        examples(connection, group, _EXAMPLES, settings),
        whom,
        group.more + max(0, group.seen - group.more - sum(count for _, count in whom)),
        domains[:TOP],
        sum(count for _, count in domains[TOP:]) + group.more_domains,
        group.reopened(now),
        endings(group),
    )


def examples(connection: Any, group: Group, most: int, settings: Settings | None = None) -> list[Example]:
    """Return the last examples of a group, the last one first.

    With ``settings`` both servers' words are those of the trace, where it has the message. Raises RedisError.
    """
    name = group.destination
    chosen_ones = divergence_groups.examples(connection, name, group.key)[-most:][::-1]
    ids = [message_id for message_id, _ in chosen_ones]
    if not ids:
        return []
    waiting, failing = connection.hmget(keys.OWN + name, ids), connection.hmget(keys.FAILURE + name, ids)
    found = []
    told = _told(connection, ids, settings) if settings else {}
    rows = zip(chosen_ones, waiting, failing, queries.envelopes(connection, ids), strict=True)
    for (message_id, at), own, failure, envelope in rows:
        found.append(_example(message_id, at, group, failure, own, envelope, told.get(message_id)))
    return found


def _example(
    message_id: str,
    at: float,
    group: Group,
    failure: bytes | None,
    own: bytes | None,
    envelope: Envelope | None,
    life: MessageLife | None,
) -> Example:
    """Put together what the ledger (the envelope while it is there, the copy's state) and the trace know."""
    state = CopyState.from_wire(failure or own)
    received = life.received if life else None
    sender = recipients = None
    client, received_at, size = "", None, None
    if envelope:
        sender, recipients = envelope.sender, tuple(recipient.address for recipient in envelope.recipients)
        client, received_at, size = envelope.client_address, envelope.received_at, envelope.size
    elif life:
        sender, recipients = life.sender, life.recipients
    if received and not envelope:
        client, received_at, size = received.client, received.at, received.size
    return Example(
        id=message_id,
        at=at,
        sender=sender or "",
        recipients=recipients or (),
        client=client,
        received_at=received_at,
        size=size,
        attempts=state.attempts or _attempts(life, group.destination),
        primary=(life.primary_reply if life else "") or "accepted",
        backup=state.last_reply or _said(life, group.destination) or group.reply or group.text,
        stands="failed" if failure else "waits" if own else "gone",
    )


def _told(connection: Any, ids: Sequence[str], settings: Settings) -> dict[str, MessageLife]:
    """Return the lives of messages, as far as the trace has them."""
    unseen = Unseen()
    others = OtherHosts.of_settings(settings, connection, unseen)
    folder = files.folder_of(settings.state_dir)
    return {life.id: life for life in lives(ids, folder, others=others, unseen=unseen)}


def _attempts(life: MessageLife | None, name: str) -> int:
    return next((copy.attempts for copy in life.copies if copy.destination == name), 0) if life else 0


def _said(life: MessageLife | None, name: str) -> str:
    """Return what a backup said the last time that it did not take a message, "" where that is not known."""
    replies = [
        part.reply
        for event in (life.events if life else ())
        if isinstance(event, Tried) and event.destination == name
        for part in event.parts
        if part.verdict != DELIVERED
    ]
    return replies[-1] if replies else ""
