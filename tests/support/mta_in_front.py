"""A client that does what an MTA in front of several relay hosts does, and remembers what it was told.

It keeps a message for each recipient that has heard neither 2xx nor 5xx, and sends it again to whichever host comes
next, with the same Message-ID. So the second try of what one host has left uncertain is another host's.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from support.dialogue import Dialogue, Unexpected, stuffed
from support.retrying_sender import message

_UNSURE = ("451 4.4.2",)  # what a relay says when a server has not answered the dot


class Attempt(NamedTuple):
    """One transaction: from when to when, through which host, and what became of those whom RCPT was said for."""

    begun: float  # monotonic
    ended: float
    port: int
    taken: tuple[str, ...]  # whose RCPT got a 2xx
    outcome: str  # "accepted", "refused" or "unsure"


@dataclass
class Sent:
    """What is known of one message."""

    number: int
    recipients: tuple[str, ...]
    accepted: set[str] = field(default_factory=set)
    bounced: set[str] = field(default_factory=set)
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        return [r for r in self.recipients if r not in self.accepted and r not in self.bounced]

    def at_most(self, recipient: str) -> int:
        """Return how many transactions may have brought the message for a recipient to anybody."""
        return sum(recipient in a.taken and a.outcome != "refused" for a in self.attempts)


class MtaInFront:
    """Sends each number as one message, over several sessions at once, each attempt through a host of its own."""

    def __init__(
        self,
        ports: Sequence[int],
        numbers: Iterable[int],
        recipients: Callable[[int], tuple[str, ...]],
        *,
        seed: int = 0,
        sessions: int = 6,
        patience: float = 120.0,
        pace: float = 0.0,
        timeout: float = 40.0,
    ) -> None:
        """``pace`` is how many seconds there are at least between the beginnings of two messages."""
        self._ports = ports
        self.sent = {number: Sent(number, recipients(number)) for number in numbers}
        self._due = list(self.sent)[::-1]
        self._seed = seed
        self._pace = pace
        self._timeout = timeout
        self._next = time.monotonic()
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + patience
        self._hurry = threading.Event()
        self.failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(sessions)]

    def start(self) -> MtaInFront:
        for thread in self._threads:
            thread.start()
        return self

    def hurry(self) -> None:
        """Begin the rest without a pace."""
        self._hurry.set()

    def join(self) -> None:
        """Wait until every recipient has been told, or the patience has ended."""
        for thread in self._threads:
            thread.join(max(0.1, self._deadline + self._timeout + 10 - time.monotonic()))
        if self.failures:
            raise AssertionError("the sender has failed") from self.failures[0]

    @property
    def unfinished(self) -> list[Sent]:
        return [sent for sent in self.sent.values() if sent.left]

    def _take(self) -> Sent | None:
        with self._lock:
            if not self._due or time.monotonic() > self._deadline:
                return None
            number, pause = self._due.pop(), self._next - time.monotonic()
            self._next = max(self._next, time.monotonic()) + (0 if self._hurry.is_set() else self._pace)
        if pause > 0:
            self._hurry.wait(pause)
        return self.sent[number]

    def _run(self, session: int) -> None:
        try:
            self._work(random.Random(f"{self._seed}/{session}"))
        except BaseException as error:
            self.failures.append(error)

    def _work(self, source: random.Random) -> None:
        kept: dict[int, Dialogue] = {}
        while (sent := self._take()) is not None:
            while sent.left and time.monotonic() < self._deadline:
                port = source.choice(self._ports)
                try:
                    client = kept.pop(port, None) or self._connected(port)
                except (OSError, Unexpected):
                    time.sleep(0.05)
                    continue
                if self._attempt(client, port, sent):
                    kept[port] = client
                else:
                    client.close()
                if sent.left:
                    time.sleep(source.uniform(0.02, 0.4))
        for client in kept.values():
            client.close()

    def _connected(self, port: int) -> Dialogue:
        client = Dialogue(port, timeout=self._timeout)
        try:
            client.hello()
        except BaseException:
            client.close()
            raise
        return client

    def _attempt(self, client: Dialogue, port: int, sent: Sent) -> bool:
        """Try to bring a message to who is left; returns whether the connection can be used again."""
        begun, taken = time.monotonic(), []
        try:
            if not client.say("MAIL FROM:<a@example.com>").startswith("250"):
                client.say("RSET", 250)
                return True
            for recipient in sent.left:
                reply = client.say(f"RCPT TO:<{recipient}>")
                if reply.startswith("2"):
                    taken.append(recipient)
                elif reply.startswith("5"):
                    sent.bounced.add(recipient)
            if not taken or not client.say("DATA").startswith("354"):
                client.say("RSET", 250)
                return True
        except (OSError, Unexpected):
            return False
        outcome = "unsure"
        try:
            client.raw(stuffed(message(sent.number)))
            reply = client.reply()
            outcome = "accepted" if reply.startswith("2") else "unsure" if reply.startswith(_UNSURE) else "refused"
            if outcome == "accepted":
                sent.accepted.update(taken)
            elif reply.startswith("5"):
                sent.bounced.update(taken)
        except (OSError, Unexpected):
            return False
        finally:
            sent.attempts.append(Attempt(begun, time.monotonic(), port, tuple(taken), outcome))
        return True
