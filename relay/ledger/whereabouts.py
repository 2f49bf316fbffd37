"""Where the copies of messages stand now: waiting, failed, on their way, held as uncertain, or in no list any more.

Reads the ledger alone, some hundred messages in one round trip. Raises RedisError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.batches import batched
from relay.ledger import keys
from relay.ledger.copy_state import CopyState

WAITS, FAILED, GONE = "waits", "failed", "gone"
_PAGE = 200  # messages


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where one copy stands: ``state`` is waits, failed or gone; ``since``, seconds since the epoch, 0 for gone.

    ``is_busy``: a worker has it in hand. ``attempts`` and ``last_reply`` are of the tries so far.
    """

    state: str
    since: float = 0.0
    attempts: int = 0
    last_reply: str = ""
    is_busy: bool = False


@dataclass(frozen=True, slots=True)
class MessageWhereabouts:
    """A message: ``uncertain_until`` is when its copies are delivered anyway, None unless it is held as uncertain."""

    copies: Mapping[str, Whereabouts]
    is_staged: bool = False
    uncertain_until: float | None = None


def find(connection: Any, messages: Mapping[str, Iterable[str]]) -> dict[str, MessageWhereabouts]:
    """Return where the copies of these messages for these destinations stand, by message and destination."""
    found: dict[str, MessageWhereabouts] = {}
    wanted = [(message_id, list(dict.fromkeys(names))) for message_id, names in messages.items()]
    for page in batched(wanted, _PAGE):
        pipe = connection.pipeline(transaction=False)
        for message_id, names in page:
            pipe.zscore(keys.STAGED, message_id)
            pipe.zscore(keys.UNCERTAIN, message_id)
            for name in names:
                pipe.zscore(keys.PENDING + name, message_id)
                pipe.zscore(keys.FAILED + name, message_id)
                pipe.zscore(keys.BUSY + name, message_id)
                pipe.hget(keys.OWN + name, message_id)
                pipe.hget(keys.FAILURE + name, message_id)
        answers = iter(pipe.execute())
        for message_id, names in page:
            staged, uncertain = next(answers), next(answers)
            copies = {name: _one([next(answers) for _ in range(5)]) for name in names}
            found[message_id] = MessageWhereabouts(
                copies, is_staged=staged is not None, uncertain_until=None if uncertain is None else float(uncertain)
            )
    return found


def _one(answers: Sequence[Any]) -> Whereabouts:
    waits, failed, busy, own, failure = answers
    if waits is not None:
        state = CopyState.from_wire(own)
        return Whereabouts(WAITS, float(waits), state.attempts, state.last_reply, busy is not None)
    if failed is not None:
        state = CopyState.from_wire(failure)
        return Whereabouts(FAILED, float(failed), state.attempts, state.last_reply)
    return Whereabouts(GONE)
