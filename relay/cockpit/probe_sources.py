"""Whom a probe asks about: the addresses of a file, or the recipients that the trace remembers, of all hosts.

Of the trace only those are asked about whose copies the server gets. Raises BadTable, OSError, RedisError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from relay.cockpit import tracing
from relay.cockpit.formatting import count
from relay.cockpit.moves import Answering, Kept, Wish, wish, wishes_of_file
from relay.config.model import Settings
from relay.ledger.probe_evidence import LISTED, REFUSALS, SEEN
from relay.trace import files
from relay.trace.lookup import Reader, Unseen
from relay.trace.privacy import CLEAR
from relay.trace.recipients import SeenRecipients
from relay.trace.remote_lookup import OtherHosts


class NoAddresses(LookupError):
    """The trace has nobody to ask about; the text says why."""


@dataclass(slots=True)
class Recipients:
    """Whom to ask about, by the keys of their addresses, and why not about others."""

    what: str  # LISTED, SEEN or REFUSALS, see relay/ledger/probe_evidence.py
    source: str
    addresses: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def of_file(text: str, source: str, *, fold: bool) -> Recipients:
    """Read the addresses of a file; a domain is a fault, one that is there twice is asked about once."""
    found = Recipients(LISTED, source)
    seen: dict[str, None] = {}
    repeated = 0
    for one in wishes_of_file(text, fold=fold):
        if isinstance(one, Kept):
            found.faults.append(f"{one.address}: {one.why}")
        elif one.key.startswith("@"):
            found.faults.append(f"{_shown(one)}: a domain is no mailbox")
        elif one.key in seen:
            repeated += 1
        else:
            seen[one.key] = None
    if repeated:
        found.notes.append(
            f"{count(repeated, 'address is', 'addresses are')} there more than once, and asked about once"
        )
    found.addresses = list(seen)
    return found


def _shown(one: Wish) -> str:
    return f"line {one.line}: {one.text}"


def on_route(found: Recipients, answering: Answering, route: str) -> None:
    """Leave out those whose mail takes another route."""
    chosen = [key for key in found.addresses if answering.former(key).route.name == route]
    if others := len(found.addresses) - len(chosen):
        found.notes.append(f"{count(others, 'address takes another route', 'addresses take other routes')}: not asked")
    found.addresses = chosen


def of_trace(
    settings: Settings,
    connection: Any,
    name: str,
    what: str,
    since: float,
    progress: Callable[[int, int], object] | None = None,
) -> Recipients:
    """Return whom the primary has taken since then, or (REFUSALS) refused. Raises NoAddresses."""
    if not settings.trace.max_bytes:
        raise NoAddresses("no trace is kept: trace.max_bytes is 0; --recipients FILE asks about a list")
    if settings.trace.addresses != CLEAR:
        raise NoAddresses(
            f"trace.addresses is {settings.trace.addresses}: the trace has no addresses to ask about; "
            "--recipients FILE asks about a list"
        )
    found, unseen = SeenRecipients(), Unseen()
    with Reader(files.folder_of(settings.state_dir), unseen) as reader:
        for event in reader.received(since, progress):
            found.take(event)
    OtherHosts.of_settings(settings, connection, unseen).recipients(since, found)
    source = f"trace, without {', '.join(dict.fromkeys(unseen.silent))}" if unseen.silent else "trace"
    made = Recipients(what, source, notes=tracing.unseen(unseen))
    made.addresses = list(_copied(settings, connection, name, made, found))
    if found.hashed:
        made.notes.append(f"{count(found.hashed, 'time', 'times')} an address is kept hashed: it is not asked about")
    if found.is_cut:
        made.notes.append("there were more recipients than are looked at: the newest are asked about")
    if what == SEEN and not made.addresses:
        raise NoAddresses(f"the trace has nobody whose copies {name} gets; --recipients FILE asks about a list")
    return made


def _copied(settings: Settings, connection: Any, name: str, made: Recipients, found: SeenRecipients) -> Iterator[str]:
    """Yield the keys of those whose copies a server gets; who was taken after all was not refused as unknown."""
    fold = settings.routes.fold_local
    answering = Answering(connection, settings)
    accepted = dict.fromkeys(_keys(found.accepted, fold=fold))
    chosen = accepted
    if made.what == REFUSALS:
        chosen = {key: None for key in _keys(found.refused, fold=fold) if key not in accepted}
    others = 0
    for key in chosen:
        if answering.is_copied(key, name):
            yield key
        else:
            others += 1
    if others:
        made.notes.append(f"{name} gets no copies for {count(others, 'recipient')}: not asked about")


def _keys(addresses: dict[str, None], *, fold: bool) -> Iterator[str]:
    for address in addresses:
        one = wish(address, fold=fold)
        if isinstance(one, Wish) and not one.key.startswith("@"):
            yield one.key
