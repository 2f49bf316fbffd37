"""Whether a server may be used, by what it has answered lately: its circuit breaker.

The workers have one for each destination, the relay one for each server that has a substitute. It decides nothing about
a message, does no I/O, and never raises.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from relay.mail.reply import Reply

_JITTER = 0.1
_FIRST_PROBE = 1.0
_LONGEST_PROBE = 60.0
_SAME_REFUSALS = 20  # messages in a row with the same reply: it may be the server's attitude and not the messages
_SAME_ABOUT_IT = 100  # where the reply itself says that it is about this mailbox, or this message
_LOOKS = 3  # the last of them are chosen to be unlike those before
# RFC 3463: the mailbox is wrong, disabled or full; the message is too large, its content cannot be taken.
_ABOUT_IT = re.compile(r"5\.(?:1\.(?:1|3|6|10)|2\.\d+|3\.4|6\.\d+)")
_STATUS = re.compile(r"5\.\d{1,3}\.\d{1,3}(?![\d.])")
_BROKEN_TRANSACTIONS = 3  # in a row, that met trouble of the server's or broke off, before the server is to blame
_DOUBLINGS = 5  # of both limits, one for each doubt that turned out to be wrong ...
_REMEMBERED = 600.0  # ... for so many seconds after the last one


@dataclass(slots=True)
class Benefit:
    """The benefit of the doubt: how many times as much it takes to blame the server, the more so if that was wrong."""

    clock: Callable[[], float]
    _doublings: int = field(init=False, default=0)
    _granted_at: float = field(init=False, default=0.0)

    @property
    def times(self) -> int:
        if self._doublings and self.clock() - self._granted_at > _REMEMBERED:
            self._doublings = 0
        return 1 << self._doublings

    def grant(self) -> None:
        """Note that the server was to blame for nothing."""
        self._doublings = min(self._doublings + 1, _DOUBLINGS)
        self._granted_at = self.clock()


@dataclass(slots=True)
class Breaker:
    """Whether a destination may be used, and how widely.

    Closed: up to ``window`` transactions at once, growing by one with each success up to ``limit``. Open: nothing
    but one probe at ``probe_at`` (monotonic), the pause doubling from 1 s to 60 s. In between, ``is_in_doubt``: trouble
    in the last transaction, or so many refusals in a row, all alike, that the next copies, one at a time, are to be
    unlike those. What ends with a message taken was wrong: the next time takes twice as much. ``on_change`` is
    called when it opens or closes.
    """

    limit: int
    longest: float = _LONGEST_PROBE
    on_change: Callable[[Breaker], None] = lambda breaker: None
    clock: Callable[[], float] = time.monotonic
    window: int = field(init=False, default=1)
    reason: str = field(init=False, default="")
    opened_at: float = field(init=False, default=0.0)
    probe_at: float = field(init=False, default=0.0)
    is_refusing: bool = field(init=False, default=False)  # it answers, but refuses everything
    is_breaking: bool = field(init=False, default=False)  # it greets, but no transaction comes to its end
    carried: int = field(init=False, default=0)  # transactions that the server carried through
    _pause: float = field(init=False, default=_FIRST_PROBE)
    _broken: int = field(init=False, default=0)
    _trouble: str = field(init=False, default="")  # what the last of them met
    _refusal: str = field(init=False, default="")
    _refused: int = field(init=False, default=0)
    _most: int = field(init=False, default=_SAME_REFUSALS)
    _looks: int = field(init=False, default=0)  # refusals of copies that were chosen to be unlike those before
    _when_refusing: Benefit = field(init=False)
    _when_breaking: Benefit = field(init=False)

    def __post_init__(self) -> None:
        self._when_refusing, self._when_breaking = Benefit(self.clock), Benefit(self.clock)

    @property
    def is_open(self) -> bool:
        return bool(self.reason)

    @property
    def is_clear(self) -> bool:
        """Whether it is neither open nor in doubt; asked before each message."""
        return not (self.reason or self._broken or ((self._refused or self.is_refusing) and self._seems_to_refuse))

    @property
    def is_in_doubt(self) -> bool:
        """Whether it may be the server and not these messages: what is tried next is to be as different as can be."""
        return not self.reason and (self._broken > 0 or self._seems_to_refuse)

    @property
    def seconds_to_probe(self) -> float:
        return max(0.0, self.probe_at - self.clock())

    def works(self) -> None:
        """Note a transaction that the server carried through, whatever it said about the message."""
        self._broken = 0
        self.carried += 1
        if self.reason:
            self._close()
        else:
            self.window = min(self.window + 1, self.limit)

    def took(self) -> None:
        """Note that it took a message: whatever it refused or broke off before was about those messages."""
        if (self._refused or self.is_refusing) and self._seems_to_refuse:
            self._when_refusing.grant()
        if self.is_breaking:
            self._when_breaking.grant()
        self._refused = self._looks = 0
        self._refusal = ""

    def refuses(self, reply: Reply, *, is_look: bool = False) -> None:
        """Note a message refused for good; ``is_look`` when it was tried because it is unlike those before.

        Refusals of some messages are about these. The destination is paused when what was chosen to be different meets
        the same reply too; from then on each probe that is refused makes the pause longer, and one that is taken ends
        it. Refusals do not widen the window.
        """
        self._broken = 0
        self.carried += 1
        status = _STATUS.match(reply.lines[0])
        kind = status[0] if status else str(reply.code)  # the text may quote an address
        if kind != self._refusal:
            self._refusal, self._refused, self._looks = kind, 0, 0
            self._most = _SAME_ABOUT_IT if _ABOUT_IT.fullmatch(kind) else _SAME_REFUSALS
        self._refused += 1
        self._looks += is_look
        if self._refused >= self._most * self._when_refusing.times // 2:
            self.window = 1  # or what is under way by the time that it is in doubt would all be refused as well
        if self.is_refusing or (self.is_in_doubt and self._looks >= _LOOKS):
            self.is_refusing = True
            self.opens(f"refuses every message: {reply.text}")
        elif self.is_open:
            self._close()

    def breaks(self, reason: str) -> None:
        """Note a transaction that met trouble: one may be the message's doing, several in a row are the server's."""
        self._broken += 1
        self._trouble = reason
        if self.is_open or self._broken >= _BROKEN_TRANSACTIONS * self._when_breaking.times:
            self.is_breaking = True
            self.opens(reason)

    def has_no_other(self) -> None:
        """Note that every copy at hand has met trouble: only time can tell whether it is the server's."""
        self.is_breaking = True
        self.opens(self._trouble)

    def opens(self, reason: str) -> None:
        """Note trouble with the server: nothing is tried before the next probe."""
        now = self.clock()
        longest = _LONGEST_PROBE if self.is_refusing else self.longest  # each of those probes costs a copy
        if not self.is_open:
            self.opened_at = now
            self._pause = min(_FIRST_PROBE, longest)
        elif now < self.probe_at:
            return  # another transaction of before
        else:
            self._pause = min(self._pause * 2, longest)
        self.reason = reason
        self.window = 1
        self.probe_at = now + self._pause * random.uniform(1 - _JITTER, 1 + _JITTER)
        self.on_change(self)

    def probe_now(self) -> None:
        """An operator's flush: do not wait."""
        self.probe_at = self.clock()
        self._pause = _FIRST_PROBE / 2

    @property
    def _seems_to_refuse(self) -> bool:
        return self.is_refusing or self._refused >= self._most * self._when_refusing.times - _LOOKS

    def _close(self) -> None:
        self.reason = ""
        self.is_refusing = self.is_breaking = False
        self._looks = 0
        self._pause = _FIRST_PROBE
        self.window = 1
        self.on_change(self)
