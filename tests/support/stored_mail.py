"""Mail as it lies in a mailbox, told apart into envelope, trace lines and what was sent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from support.corpus import Mail
from support.waiting import wait_until

_FIELD = re.compile(rb"([!-9;-~]+):[ \t]*([^\n]*\n(?:[ \t][^\n]*\n)*)")
_ENVELOPE = frozenset({b"return-path", b"x-original-to", b"delivered-to", b"envelope-to"})
_OUR_ID = re.compile(rb"\(smtp-dup\) with \w+ id (\w+)")


class Store(Protocol):
    """A server with one mailbox for everything."""

    @property
    def log(self) -> str: ...

    def maildir_messages(self) -> list[bytes]: ...

    def wait_for(self, count: int, timeout: float = 60) -> list[bytes]: ...


class Stored(NamedTuple):
    """One delivery to one recipient. ``id`` is smtp-dup's; ``content`` all that is below the trace lines of the way."""

    recipient: str
    sender: str
    content: bytes
    id: str

    @property
    def subject(self) -> str:
        found = re.search(rb"(?mi)^subject: *(.*)$", self.content)
        return found[1].decode("utf-8", "surrogateescape") if found else ""


def read(raw: bytes, hops: int = 3) -> Stored:
    """Read what a mailbox holds: some lines about the envelope, then so many Received lines, then the message.

    Exactly so many: trace lines that were in the message when it was sent belong to its content.
    """
    envelope: dict[bytes, str] = {}
    position, received, message_id = 0, 0, b""
    while received < hops:
        field = _FIELD.match(raw, position)
        assert field, f"only {received} of {hops} trace lines: {raw[:2000]!r}"
        name = field[1].lower()
        if name == b"received":
            received += 1
            message_id = found[1] if (found := _OUR_ID.search(field[0])) else message_id
        else:
            assert name in _ENVELOPE, raw[:2000]
            assert name not in envelope, raw[:2000]
            envelope[name] = field[2].strip().decode("utf-8", "surrogateescape")
        position = field.end()
    recipient = envelope.get(b"x-original-to") or envelope[b"envelope-to"]
    return Stored(recipient, envelope[b"return-path"].strip("<>"), raw[position:], message_id.decode())


def all_of(store: Store, hops: int = 3) -> list[Stored]:
    """Return everything in a store."""
    return [read(raw, hops) for raw in store.maildir_messages()]


def wait_for(store: Store, mails: Iterable[Mail], timeout: float = 60, hops: int = 3) -> list[Stored]:
    """Wait until every one of these is there for each of its recipients, and return everything in the store."""
    wanted = {recipient for mail in mails for recipient in mail.recipients}
    store.wait_for(len(wanted), timeout)
    wait_until(
        lambda: wanted <= {delivery.recipient for delivery in all_of(store, hops)},
        timeout,
        lambda: f"missing: {sorted(wanted - {d.recipient for d in all_of(store, hops)})[:20]}\n{store.log[-2000:]}",
        interval=0.5,
    )
    return all_of(store, hops)


def differences(mails: Iterable[Mail], deliveries: Iterable[Stored]) -> list[str]:
    """Say what is missing, there twice, or not as it was sent; nothing when all is well."""
    mails, deliveries = list(mails), list(deliveries)
    by_recipient = {recipient: mail for mail in mails for recipient in mail.recipients}
    count = Counter(delivery.recipient for delivery in deliveries)
    found = [f"{mail.name}: {count[r]} times for {r}" for r, mail in by_recipient.items() if count[r] != 1]
    found += [f"nobody sent anything to {recipient}" for recipient in count if recipient not in by_recipient]
    for delivery in deliveries:
        mail = by_recipient.get(delivery.recipient)
        if mail is not None and delivery.sender != mail.sender:
            found.append(f"{mail.name}: sender {delivery.sender!r} is not {mail.sender!r}")
        if mail is not None and delivery.content != mail.stored:
            found.append(f"{mail.name}: {_first_difference(mail.stored, delivery.content)}")
    return found


def _first_difference(sent: bytes, got: bytes) -> str:
    at = next((i for i, (x, y) in enumerate(zip(sent, got, strict=False)) if x != y), min(len(sent), len(got)))
    start = max(0, at - 40)
    return f"differs at octet {at}: sent {sent[start : at + 40]!r}, got {got[start : at + 40]!r}"
