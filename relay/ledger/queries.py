"""Reads the ledger in pages: ids in order of time, envelopes without their bodies, one whole message.

Nothing here changes the ledger. Pages go by time and not by rank, so that nothing is missed when copies leave a list
while it is read. For a message that is missing or cannot be read, the envelope is None; an unknown id or destination
raises UnknownId or UnknownDestination, with a text for the operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from relay.ledger import keys, registry
from relay.ledger.copy_state import CopyState
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.ids import is_id, is_job_id, text
from relay.mail.record import LockedRecord, Message
from relay.mail.stored import moment
from relay.mail.text import printable

PAGE = 1000
_MESSAGES = (keys.PENDING, keys.FAILED, keys.STAGED, keys.UNCERTAIN)
_HEADS = (1 << 10, 16 << 10, 1 << 20, 0)  # octets of a record in which its envelope is looked for, 0: all
# ARGV: octets, ids. One command for a page: one for each id would take redis-py longer than the rest of a listing.
_FRONTS = """
local fronts = {}
for i = 2, #ARGV do fronts[i - 1] = redis.call('GETRANGE', 'smtpdup:message:' .. ARGV[i], 0, ARGV[1] - 1) end
return fronts
"""
_CHUNK = 4 << 20  # octets read at once, so that a large message does not block Redis


class Unknown(LookupError):
    """An operator named something that does not exist; the text is one line."""


class UnknownId(Unknown):
    """No such message where it was looked for."""


class UnknownDestination(Unknown):
    """No such destination in the ledger."""


def destinations(connection: Any, name: str | None = None) -> list[Destination]:
    """Return every destination ever used, or the one of this name. Raises UnknownDestination."""
    known = registry.destinations(connection)
    if name is None:
        return list(known.values())
    if name not in known:
        raise UnknownDestination(f"no destination {name!r}; known: {', '.join(known) or 'none'}")
    return [known[name]]


def pages(
    connection: Any, key: str, *, since: float = -math.inf, until: float = math.inf, size: int = PAGE
) -> Iterator[list[tuple[str, float]]]:
    """Yield pages of (member, score) of a list of messages or jobs, lowest score first, between two scores."""
    low, seen = repr(since), set[bytes]()
    is_valid = is_id if key.startswith(_MESSAGES) else is_job_id
    while True:
        found = _scored(connection, key, low, until, size + len(seen))
        # A full page is cut at its last score: members with that score may follow on the next page.
        fresh = [(member, score) for member, score in found if member not in seen][:size]
        if not fresh:
            return
        # A member without the form of an id is ignored: it must not become a key, a file or a job.
        page = [(name, moment(score)) for member, score in fresh if is_valid(name := text(member))]
        if page:
            yield page
        last = fresh[-1][1]
        if repr(last) != low:
            seen = set()
        seen.update(member for member, score in fresh if score == last)
        low = repr(last)


def _scored(connection: Any, key: str, low: str, until: float, count: int) -> list[tuple[bytes, float]]:
    """Return members with their scores, bypassing redis-py's own method, which is slower."""
    found = connection.execute_command("ZRANGEBYSCORE", key, low, until, "WITHSCORES", "LIMIT", 0, count)
    if found and not isinstance(found[0], list):  # RESP2: one after the other
        found = list(zip(found[::2], map(float, found[1::2]), strict=True))
    return cast("list[tuple[bytes, float]]", found)


def envelopes(connection: Any, ids: Sequence[str], unread: dict[str, str] | None = None) -> list[Envelope | None]:
    """Return the envelopes of messages without reading bodies; None if one is missing or cannot be read.

    ``unread`` gets id -> why it cannot be read.
    """
    why: dict[str, str] = {} if unread is None else unread
    found: list[Envelope | None] = [None] * len(ids)
    wanted = list(range(len(ids)))
    for octets in _HEADS:
        records = connection.eval(_FRONTS, 0, octets, *(ids[n] for n in wanted)) if wanted else []
        longer = []
        for n, record in zip(wanted, records, strict=True):
            try:
                found[n] = Message.unpack_envelope(record, ids[n])
            except LockedRecord as error:
                why[ids[n]] = printable(str(error))
            except MalformedRecord as error:
                if len(record) == octets:
                    longer.append(n)
                elif record:
                    why[ids[n]] = f"damaged: {printable(str(error))}"
        wanted = longer
        if not wanted:
            break
    return found


def message(connection: Any, message_id: str) -> Message:
    """Return a message. Raises UnknownId, MalformedRecord, BodyElsewhere."""
    chunks: list[bytes] = []
    while not chunks or len(chunks[-1]) == _CHUNK:
        start = len(chunks) * _CHUNK
        chunks.append(connection.getrange(keys.MESSAGE + message_id, start, start + _CHUNK - 1))
    record = b"".join(chunks)
    if not record:
        raise UnknownId(f"no message {message_id!r}")
    return Message.unpack(record, message_id)


def addressees(envelope: Envelope | None, destination: Destination, state: CopyState) -> tuple[str, ...]:
    """Return the addresses of the recipients to whom a copy is owed."""
    if envelope is None:
        return ()
    owed = envelope.owed_to(destination) if state.owed is None else state.owed
    return tuple(envelope.recipients[i].address for i in owed if 0 <= i < len(envelope.recipients))
