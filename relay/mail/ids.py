"""What may be a name: message ids, names of destinations, ids of jobs, checked where they come in from Redis or a job.

What Redis says is data. Such a name becomes a key, a queue, a file, a label or a line of a listing only when it has
the form that we give it; what has not is no name of ours, whoever wrote it.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # of ids. Crockford base 32: no i, l, o, u
_ID = re.compile(rf"[{ALPHABET}]{{16}}")
_IDS = re.compile(rf"(?:[{ALPHABET}]{{16}},)*")
# The name becomes a queue's name, a Redis key and a metric's label.
_DESTINATION = re.compile(r"[A-Za-z0-9._:\-\[\]]{1,100}")
_COUNT_BITS = 15
_COUNTED = (1 << _COUNT_BITS) - 1
_JOB = re.compile(r"[\w-]{1,200}", re.ASCII)


def is_id(value: object) -> TypeGuard[str]:
    """Say whether this is a message id of ours in form."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def are_ids(values: object) -> TypeGuard[list[str]]:
    """Say whether this is a list of message ids; a long one is looked at as a whole."""
    if not isinstance(values, list) or not set(map(type, values)) <= {str}:
        return False
    # With a comma in one of them there are more of 16 than there are.
    return _IDS.fullmatch(",".join([*values, ""])) is not None and all(len(value) == 16 for value in values)


def is_destination_name(value: object) -> TypeGuard[str]:
    """Say whether this can be the name of a destination."""
    return isinstance(value, str) and _DESTINATION.fullmatch(value) is not None


def is_job_id(value: object) -> TypeGuard[str]:
    """Say whether this can be the id of an RQ job of ours."""
    return isinstance(value, str) and _JOB.fullmatch(value) is not None


def text(value: bytes | str) -> str:
    """Return what Redis holds as text; octets that are no UTF-8 are escaped, since any may be there."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def message_ids(members: Iterable[bytes | str]) -> list[str]:
    """Return the members of a list in Redis that are message ids."""
    return [member for member in map(text, members) if is_id(member)]


def names(members: Sequence[bytes | str]) -> list[str]:
    """Return the members of a list in Redis that can be names of destinations."""
    return [member for member in map(text, members) if is_destination_name(member)]


class IdSource:
    """Makes message ids: 16 characters, ordered by time (ms), that name the process which made them.

    Characters 9 to 12 are the owner: 20 random bits for each relay process, so that what a dead process
    left staged can be found by its ids alone. The last three count within the process. Each is later than all before,
    also while this host's clock is behind what it was: an id that comes twice is a message written over another.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.owner = _base32(random.SystemRandom().getrandbits(20), 4)
        self._clock = clock
        self._last = 0  # milliseconds and count

    def next(self) -> str:
        count = (self._last + 1) & _COUNTED
        self._last = max(int(self._clock() * 1000) << _COUNT_BITS | count, self._last + 1)
        return _base32(self._last >> _COUNT_BITS, 9) + self.owner + _base32(self._last & _COUNTED, 3)


def owner_of(message_id: str) -> str:
    """Return the owner part of a message id."""
    return message_id[9:13]


def made_at(message_id: str) -> float:
    """Return when a message id was made, seconds since the epoch; infinity for what is no id of ours."""
    digits = [ALPHABET.find(character) for character in message_id[:9]]
    if len(message_id) != 16 or min(digits) < 0:
        return math.inf
    return sum(digit << shift for digit, shift in zip(digits, range(40, -1, -5), strict=True)) / 1000


def _base32(number: int, width: int) -> str:
    return "".join(ALPHABET[(number >> shift) & 31] for shift in range(5 * (width - 1), -1, -5))
