"""Whether a refusal on a reused connection may be about the connection, so that it is repeated on a new one.

Servers limit the messages of one connection (OpenSMTPD: 100, Stalwart: 10) or count its errors; many refuse then with a
code that seems to be about the message. A new connection shows which it is. If the new one gets the same refusal, this
kind is not repeated for a while: a server that refuses everything would otherwise get twice the load. A refusal that
can only be about the mailbox or the message is never repeated. Nothing here raises.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

from relay.mail.reply import Reply

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
_KINDS = 200  # remembered; the budget bounds a server whose texts are all different
_BUDGET = 20.0  # repetitions in vain at once ...
_REFILL = 1.0  # ... and more of them per second
# RFC 3463, permanent: about the address, the mailbox, the size or the content.
_ABOUT_IT = re.compile(r"5\.(?:[126]\.\d+|3\.4)(?!\d)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,:;!]?")


class SessionRefusals:
    """The kinds of refusals of one server that a new connection has confirmed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pauses: dict[str, tuple[float, float]] = {}  # kind -> until when it is not repeated, that pause
        self._budget = _BUDGET
        self._counted_at = clock()

    def is_doubtful(self, reply: Reply) -> bool:
        """Return whether to repeat the command on a new connection; if so, the repetition is counted."""
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

    def settle(self, doubted: Reply, replies: Collection[Reply]) -> None:
        """Note what a new connection said instead: the same, a yes, or something that says nothing of that refusal."""
        kind = _kind(doubted)
        if any(reply.code < 400 for reply in replies):
            self._pauses.pop(kind, None)
            self._budget = min(_BUDGET, self._budget + 1.0)
        elif any(_kind(reply) == kind for reply in replies):
            self._confirmed(kind)

    def _confirmed(self, kind: str) -> None:
        _, pause = self._pauses.pop(kind, (0.0, 0.0))
        pause = min(_LONGEST_PAUSE, pause * 2) if pause else _FIRST_PAUSE
        self._pauses[kind] = (self._clock() + pause, pause)
        if len(self._pauses) > _KINDS:
            del self._pauses[next(iter(self._pauses))]


def _kind(reply: Reply) -> str:
    """Return code, status and the first words of a refusal, without addresses, numbers and ids."""
    code, *words = f"{reply.code} {reply.lines[0]}".split()
    status = words[0] if words and re.fullmatch(r"[245]\.\d{1,3}\.\d{1,3}", words[0]) else ""
    return " ".join([code, status, *[word for word in words if _WORD.fullmatch(word)][:6]])
