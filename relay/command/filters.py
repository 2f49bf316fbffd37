"""Which copies a command is about: one filter for all that change many, its parts joined by "and"."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from relay.command.exit_status import Misuse
from relay.config.types import duration
from workers.queues.backlog import WaitingCopy


@dataclass(frozen=True, slots=True)
class Filter:
    """Ids, a destination, an age in seconds, a sender, a recipient; what is not given lets all pass.

    An address that begins with @ stands for everybody in that domain; letters are not told apart by case.
    """

    ids: Collection[str] = ()
    destination: str | None = None
    older_than: float = 0.0
    sender: str | None = None
    recipient: str | None = None

    @classmethod
    def read(
        cls,
        ids: Collection[str],
        *,
        destination: str | None,
        older_than: str | None,
        sender: str | None,
        recipient: str | None,
    ) -> Filter:
        """Read it from a command line. Raises Misuse."""
        try:
            age = duration().read(older_than) if older_than is not None else 0.0
        except ValueError as error:
            raise Misuse(f"--older-than: {error}") from None
        return cls(frozenset(ids), destination, age, sender, recipient)

    @property
    def is_empty(self) -> bool:
        """Whether it lets everything pass."""
        return self == Filter(frozenset())

    def takes(self, copy: WaitingCopy, now: float) -> bool:
        """Say whether a copy passes."""
        return (
            (not self.ids or copy.id in self.ids)
            and self.destination in {None, copy.destination}
            and now - copy.received_at >= self.older_than
            and (self.sender is None or _matches(self.sender, copy.sender))
            and (self.recipient is None or any(_matches(self.recipient, r) for r in copy.recipients))
        )


def _matches(wanted: str, address: str) -> bool:
    wanted, address = wanted.lower(), address.lower()
    if wanted == "<>":
        return not address
    return address.endswith(wanted) if wanted.startswith("@") else address == wanted
