"""The retry policy: when a copy is tried again, what a failure is about, width of a destination.

Only ``judge`` decides whether trouble is about a recipient, about the message or about the server. Unknown
means temporary; permanent is only the server's own 5xx about this message or recipient. Trouble with the
server never burns a copy: the breaker (relay.breaker) opens, and probes find out when it is back.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field

from relay.config.model import RetrySettings
from relay.mail.reply import Reply

_ABOUT_US = (530, 534, 535, 538)  # it wants us to authenticate, or better: nothing to do with the message
_JITTER = 0.1
_SLACK = 10.0  # seconds: what is not a try by the schedule is again after five
_NEAR_CONNECTIONS, _FAR_CONNECTIONS = 20, 40  # a Postfix lets one client have 50
_FAR = 0.02  # seconds of a round trip


class Meaning(enum.Enum):
    """What a reply means for a copy."""

    TAKEN = "taken"
    LATER = "later"  # 4xx: this recipient, or all of this message, again by the schedule
    NEVER = "never"  # 5xx about this recipient or this message
    SPLIT = "split"  # too many recipients: the rest at once in another transaction
    SERVER = "server"  # the server, not the message


def judge(reply: Reply, *, soft_bounce: bool = False, some_accepted: bool = False) -> Meaning:
    """Return what a reply to MAIL, RCPT, DATA or the dot is about."""
    if reply.is_positive:
        return Meaning.TAKEN
    if reply.code == 421 or reply.code in _ABOUT_US:
        return Meaning.SERVER
    is_too_many = reply.is_too_many_recipients
    if some_accepted and (is_too_many or (reply.code in (452, 552) and reply.status[2:] != "2.2")):
        # RFC 5321 4.5.3.1.10; 552 is what it was called before. x.2.2 is one full mailbox.
        return Meaning.SPLIT
    if is_too_many:
        return Meaning.LATER  # of a transaction, never of a recipient
    if reply.is_permanent and not soft_bounce:
        return Meaning.NEVER
    return Meaning.LATER


def next_delay(settings: RetrySettings, tries: int, age: float) -> float | None:
    """Return the seconds until the next try after so many, or None to give up.

    ``retry.first``, doubling with jitter to ``retry.longest``; the last try is due at ``retry.give_up``. ``age`` is in
    seconds since the clock of this copy started.
    """
    remaining = settings.give_up - age
    if remaining <= 0:
        return None
    delay = min(settings.longest, settings.first * 2.0 ** min(tries - 1, 40))
    delay *= 1 + random.uniform(-_JITTER, _JITTER)
    return max(0.1, min(delay, remaining))


def longest_delay(settings: RetrySettings) -> float:
    """Return the seconds that no copy waits longer for its next try, of whatever schedules one."""
    return settings.longest * (1 + _JITTER) + _SLACK


@dataclass(slots=True)
class Width:
    """How many transactions at once a destination gets at most: as set, else few for a near one, more for a far one.

    A far server is idle while octets travel. How far it is shows in how soon it answers MAIL, at its best: the
    estimate falls at once, and rises slowly.
    """

    connections: int  # as set; 0: by the distance
    round_trip: float = field(init=False, default=0.0)  # seconds
    part: int = field(init=False, default=0)  # of a throttle; 0: there is none

    @property
    def most(self) -> int:
        return self._bounded(self.connections or _FAR_CONNECTIONS)

    @property
    def now(self) -> int:
        return self._bounded(self.connections or (_FAR_CONNECTIONS if self.round_trip > _FAR else _NEAR_CONNECTIONS))

    def _bounded(self, count: int) -> int:
        return min(count, self.part) if self.part else count

    def note(self, seconds: float) -> None:
        """Note how long a reply took that needs no thought."""
        if not self.round_trip or seconds < self.round_trip:
            self.round_trip = seconds
        else:
            self.round_trip += (seconds - self.round_trip) / 32
