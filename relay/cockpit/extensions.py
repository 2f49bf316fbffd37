"""The extensions of two servers side by side, and whether mail that was seen needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from relay.cockpit.formatting import count, octets
from relay.ledger.flow import Flow
from relay.ledger.greetings import Greeting

_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension as both servers offer it, "-" where they do not, and what of mail seen needs it."""

    extension: str
    old: str
    new: str
    used: str


def compare(old: Greeting | None, new: Greeting | None, seen: Flow) -> list[Extension]:
    """Return a row for each extension that either offers, or that the mail ``seen`` has needed."""
    return list(_rows(old or Greeting(), new or Greeting(), seen))


def _rows(old: Greeting, new: Greeting, seen: Flow) -> Iterator[Extension]:
    used = {name: count(number, "message") for name, number in seen.uses.items() if number}
    if seen.largest:
        used["SIZE"] = f"up to {octets(seen.largest)}"
    if seen.most:
        used["LIMITS"] = f"up to {count(seen.most, 'recipient')}"
    for name in sorted({*old.extensions, *new.extensions, *used, "STARTTLS"} - {"TURN"}):
        row = Extension(name, _shown(old, name), _shown(new, name), used.get(name, ""))
        if (row.old, row.new) != (_ABSENT, _ABSENT) or name in seen.uses:
            yield row


def _shown(greeting: Greeting, name: str) -> str:
    if name == "STARTTLS":
        return "yes" if greeting.offers_tls else _ABSENT
    parameters = greeting.extensions.get(name)
    return _ABSENT if parameters is None else parameters or "yes"
