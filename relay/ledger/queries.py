"""Reading the ledger in pages: ids in order of time, envelopes without their bodies, one whole message.

Nothing here changes anything. Pages go by time and not by rank, so that nothing is left out when copies leave
a list while it is read. A message that is missing or cannot be read has no envelope; an id or a destination that
an operator got wrong raises UnknownId or UnknownDestination, with a text for them.
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
from relay.mail.text import printable

PAGE = 1000
_MESSAGES = (keys.PENDING, keys.FAILED, keys.STAGED, keys.UNCERTAIN)
_HEADS = (1 << 10, 16 << 10, 1 << 20, 0)  # octets of a record to look for its envelope in, 0 for all; mostly the first
# ARGV: octets, ids. One command for a page: as many commands would take redis-py longer than all the rest of a listing.
_FRONTS = """
local fronts = {}
for i = 2, #ARGV do fronts[i - 1] = redis.call('GETRANGE', 'smtpdup:message:' .. ARGV[i], 0, ARGV[1] - 1) end
return fronts
"""
_CHUNK = 4 << 20  # octets read at once: Redis is not held up by a large message


class Unknown(LookupError):
    """Something that an operator named is not there; the text is one line for them."""


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
    """Yield the members of a list of messages or jobs with their scores, lowest first, from a score and up to one."""
    low, seen = repr(since), set[bytes]()
    is_valid = is_id if key.startswith(_MESSAGES) else is_job_id
    while True:
        found = _scored(connection, key, low, until, size + len(seen))
        # Cut off: where copies leave the list between two pages, there is more that was not seen.
        fresh = [(member, score) for member, score in found if member not in seen][:size]
        if not fresh:
            return
        # What has not the form of an id is none, whoever listed it: it must not become a key, a file or a job.
        page = [(name, score) for member, score in fresh if is_valid(name := text(member))]
        if page:
            yield page
        last = fresh[-1][1]
        if repr(last) != low:
            seen = set()
        seen.update(member for member, score in fresh if score == last)
        low = repr(last)


def _scored(connection: Any, key: str, low: str, until: float, count: int) -> list[tuple[bytes, float]]:
    """Return members with their scores. Not by redis-py's own method, which makes text of every score on the way."""
    found = connection.execute_command("ZRANGEBYSCORE", key, low, until, "WITHSCORES", "LIMIT", 0, count)
    if found and not isinstance(found[0], list):  # RESP2: one after the other
        found = list(zip(found[::2], map(float, found[1::2]), strict=True))
    return cast("list[tuple[bytes, float]]", found)


def envelopes(connection: Any, ids: Sequence[str], unread: dict[str, str] | None = None) -> list[Envelope | None]:
    """Return the envelopes of messages, None for what is missing or cannot be read. Bodies stay in Redis.

    Why one cannot be read is put into ``unread``, by its id.
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
    """Return the addresses of the recipients that a copy's state is about."""
    if envelope is None:
        return ()
    owed = envelope.owed_to(destination) if state.owed is None else state.owed
    return tuple(envelope.recipients[i].address for i in owed if 0 <= i < len(envelope.recipients))
