"""Whether a refusal on a reused connection may be the connection's own, so that it is worth asking on a new one.

Servers limit what one connection may carry (OpenSMTPD: 100 messages, Stalwart: 10), keep its errors in mind, or get
out of step with it; many say so with a code that reads like a word about the message. A new connection tells. Where
the new one says the same, it is not asked again for a while: a server that refuses everybody would otherwise get twice
the load. What only the mailbox or the message can be the reason of is never asked twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from relay.mail.reply import Reply

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_KINDS = 200  # remembered; a server that says everything in new words is bounded by the budget
_BUDGET = 20.0  # repetitions in vain that may come at once ...
_REFILL = 1.0  # ... and how many more of them in a second
# RFC 3463, permanent: the address, the mailbox, the size, the content.
_ABOUT_IT = re.compile(r"5\.(?:[126]\.\d+|3\.4)(?!\d)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,:;!]?")


class SessionRefusals:
    """What one server's refusals on reused connections have turned out to be."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses: dict[str, tuple[float, float]] = {}  # kind -> until when it is believed, the pause until then
        self._budget = _BUDGET
        self._counted_at = clock()

    def is_doubtful(self, reply: Reply) -> bool:
        """Say whether to ask again on a new connection; counts as asked if so."""
        if reply.code < 400 or (reply.code != 421 and _ABOUT_IT.match(reply.lines[0])):
            return False
        now = self._clock()
        self._budget = min(_BUDGET, self._budget + (now - self._counted_at) * _REFILL)
        self._counted_at = now
        until, _ = self._pauses.get(_kind(reply), (0.0, 0.0))
        if now < until or self._budget < 1.0:
            return False
        self._budget -= 1.0
        return True

    def confirmed(self, reply: Reply) -> None:
        """Note that a new connection was refused as well."""
        kind = _kind(reply)
        _, pause = self._pauses.pop(kind, (0.0, 0.0))
        pause = min(_LONGEST_PAUSE, pause * 2) if pause else _FIRST_PAUSE
        self._pauses[kind] = (self._clock() + pause, pause)
        if len(self._pauses) > _KINDS:
            del self._pauses[next(iter(self._pauses))]

    def refuted(self, reply: Reply) -> None:
        """Note that a new connection was not refused: it was about the old one."""
        self._pauses.pop(_kind(reply), None)
        self._budget = min(_BUDGET, self._budget + 1.0)


def _kind(reply: Reply) -> str:
    """Return what is the same in all refusals of a kind: no address, number or id that the text quotes."""
    code, *words = f"{reply.code} {reply.lines[0]}".split()
    status = words[0] if words and re.fullmatch(r"[245]\.\d{1,3}\.\d{1,3}", words[0]) else ""
    return " ".join([code, status, *[word for word in words if _WORD.fullmatch(word)][:6]])
