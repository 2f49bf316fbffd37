"""What comes of asking a new server about those who are to move to it: `move --check`, `ready ADDRESS --check`.

No more than so many are asked about, within a deadline. Who has none stays where it is; what nobody can tell keeps
nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from relay.cockpit.finding import Finding, fails, passes, unknown
from relay.cockpit.formatting import some
from relay.cockpit.mailbox_probe import Exists, MailboxProbe, Manner, Probed
from relay.cockpit.moves import Kept, MovePlan
from relay.config.model import Settings
from relay.mail.destination import Destination

MOST = 1000  # addresses in all
_SECONDS = 300.0  # for all together
_KEEPS = frozenset({Exists.NO, Exists.REFUSED})  # what speaks against moving a mailbox
_WORDS = {Exists.NO: "does not exist", Exists.REFUSED: "would be refused"}


def probe(settings: Settings, server: Destination, addresses: Sequence[str]) -> list[Probed]:
    """Ask about these addresses, as they are compared (relay.mail.address_keys); a domain cannot be asked about."""
    found: dict[str, Probed] = {}
    asking = MailboxProbe(settings, server, Manner(), lambda one: found.__setitem__(one.address, one))
    trouble = asyncio.run(_within(asking, [one for one in addresses if not one.startswith("@")][:MOST], server.name))
    trouble = trouble or f"not asked: more than {MOST} addresses"
    domain = "a domain is no mailbox: nobody was asked"
    return [
        found.get(one) or Probed(one, Exists.UNTOLD, domain if one.startswith("@") else trouble) for one in addresses
    ]


async def _within(asking: MailboxProbe, addresses: Sequence[str], name: str) -> str:
    """Ask until the deadline; returns why it ended early."""
    try:
        async with asyncio.timeout(_SECONDS):
            await asking.ask(addresses)
    except TimeoutError:
        return f"no time was left: {name} has not answered within {_SECONDS:.0f} s"
    return asking.trouble


def apply(made: MovePlan, found: Sequence[Probed], *, force: bool) -> None:
    """Keep whoever has no mailbox at the new server where it is; what nobody can tell is a remark."""
    untold: dict[str, list[str]] = {}
    for one in found:
        if one.result in _KEEPS and not force:
            del made.wanted[one.address]
            made.kept.append(Kept(one.address, f"{made.to} says that it {_WORDS[one.result]}: {one.text}"))
        elif one.result in _KEEPS:
            made.remarks.append(f"{one.address}: {made.to} says that it {_WORDS[one.result]}: {one.text}")
        elif one.result is not Exists.YES:
            untold.setdefault(one.text, []).append(one.address)
    made.remarks += [f"not known to exist at {made.to}: {some(names)}: {why}" for why, names in untold.items()]


def judged(one: Probed, name: str) -> Finding:
    """Return it as a criterion of one mailbox."""
    if one.result is Exists.YES:
        return passes(f"{name} takes RCPT for it, and refuses it for others: {one.text}")
    if one.result in _KEEPS:
        return fails(f"{name} says that it {_WORDS[one.result]}: {one.text}")
    return unknown(one.text)


def counts(found: Sequence[Probed]) -> Iterator[tuple[str, int]]:
    """Yield each result that there is, and how often."""
    for result in Exists:
        if number := sum(one.result is result for one in found):
            yield result.value, number
