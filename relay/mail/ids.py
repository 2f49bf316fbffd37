"""Message ids, names of destinations and ids of jobs: making them, and checking those that come from Redis or a job.

Data from Redis is not trusted: a name becomes a key, a queue, a file, a label or a line of a listing only if it has the
form that smtp-dup gives it. Anything else is ignored or refused. Nothing here raises.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import TypeGuard

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # of ids: Crockford base 32, without i, l, o, u
_PAIRS = [a + b for a in ALPHABET for b in ALPHABET]
_ID = re.compile(rf"[{ALPHABET}]{{16}}")
_IDS = re.compile(rf"(?:[{ALPHABET}]{{16}},)*")
# The name becomes part of a queue name, a Redis key and a metric label.
_DESTINATION = re.compile(r"[A-Za-z0-9._:\-\[\]]{1,100}")
_COUNT_BITS = 15
_COUNTED = (1 << _COUNT_BITS) - 1
_ROUTE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOB = re.compile(r"[\w-]{1,200}", re.ASCII)


def is_id(value: object) -> TypeGuard[str]:
    """Return whether this has the form of a message id."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def are_ids(values: object) -> TypeGuard[list[str]]:
    """Return whether this is a list of message ids; a long one is checked in one pass."""
    if not isinstance(values, list) or not set(map(type, values)) <= {str}:
        return False
    # A comma within an element would make more words of 16 characters than there are elements.
    return _IDS.fullmatch(",".join([*values, ""])) is not None and set(map(len, values)) <= {16}


def is_destination_name(value: object) -> TypeGuard[str]:
    """Return whether this has the form of a destination name."""
    return isinstance(value, str) and _DESTINATION.fullmatch(value) is not None


def is_route_name(value: object) -> TypeGuard[str]:
    """Return whether this has the form of the name of a route."""
    return isinstance(value, str) and _ROUTE.fullmatch(value) is not None


def is_job_id(value: object) -> TypeGuard[str]:
    """Return whether this has the form of the id of an RQ job of smtp-dup."""
    return isinstance(value, str) and _JOB.fullmatch(value) is not None


def text(value: bytes | str) -> str:
    """Return a value from Redis as text; octets that are no UTF-8 are escaped."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def names(members: Sequence[bytes | str]) -> list[str]:
    """Return those members of a list from Redis that have the form of destination names."""
    return [member for member in map(text, members) if is_destination_name(member)]


class IdSource:
    """Makes message ids: 16 characters, ordered by time (ms), that identify the process which made them.

    Characters 9 to 12 are the owner: 20 random bits for each relay process, so that messages that a dead process left
    staged are found by their ids alone. The last three count within the process. Ids always increase, even when the
    clock is set back: with a repeated id, one message would overwrite another.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.owner = "".join(random.SystemRandom().choices(ALPHABET, k=4))
        self._clock = clock
        self._last = 0  # milliseconds and count

    def next(self) -> str:
        count = (self._last + 1) & _COUNTED
        self._last = max(int(self._clock() * 1000) << _COUNT_BITS | count, self._last + 1)
        last = self._last
        # Written out: every message has a moment of its own.
        return (
            f"{_PAIRS[last >> 50 & 1023]}{_PAIRS[last >> 40 & 1023]}{_PAIRS[last >> 30 & 1023]}"
            f"{_PAIRS[last >> 20 & 1023]}{ALPHABET[last >> 15 & 31]}{self.owner}"
            f"{ALPHABET[last >> 10 & 31]}{_PAIRS[last & 1023]}"
        )


def owner_of(message_id: str) -> str:
    """Return the owner part of a message id."""
    return message_id[9:13]


def made_at(message_id: str) -> float:
    """Return when a message id was made, in seconds since the epoch; infinity if it is no message id."""
    digits = [ALPHABET.find(character) for character in message_id[:9]]
    if len(message_id) != 16 or min(digits) < 0:
        return math.inf
    return sum(digit << shift for digit, shift in zip(digits, range(40, -1, -5), strict=True)) / 1000
