"""A client that sends numbered messages and does not give up: it sends again whatever got no 2xx, as an MTA does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from support.dialogue import Dialogue, Unexpected


class Sender:
    """Sends each number as one message (its Subject and Message-ID), over several sessions at once."""

    def __init__(
        self,
        port: int,
        numbers: Iterable[int],
        *,
        sessions: int = 4,
        patience: float = 60.0,
        host: str = "127.0.0.1",
        recipients: tuple[str, ...] | Callable[[int], Iterable[str]] = ("r{}@example.com",),
    ) -> None:
        """``recipients`` are those of each message, with its number in place of {}, or made of it."""
        self._recipients = recipients
        self._port = port
        self._host = host
        self._left = list(numbers)[::-1]
        self._lock = threading.Condition()
        self._most = len(self._left)  # messages that may be begun
        self._begun = 0
        self._deadline = time.monotonic() + patience
        self.accepted: set[int] = set()
        self.spans: dict[int, tuple[float, float]] = {}  # when the attempt began that got the 2xx, and when that came
        self.attempts: dict[int, int] = {}
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(sessions)]

    def start(self) -> Sender:
        for thread in self._threads:
            thread.start()
        return self

    def join(self) -> set[int]:
        """Wait until all is accepted, or the patience has ended; return what got a 2xx."""
        for thread in self._threads:
            thread.join(max(0.1, self._deadline + 30 - time.monotonic()))
        return self.accepted

    def stop(self) -> None:
        """Send nothing more, and give up what has no 2xx."""
        with self._lock:
            self._left.clear()
            self._deadline = time.monotonic()

    def pause_at(self, count: int) -> None:
        """Begin no more than so many messages, until a later call allows more."""
        with self._lock:
            self._most = count
            self._lock.notify_all()

    def _addresses(self, number: int) -> Iterable[str]:
        if callable(self._recipients):
            return self._recipients(number)
        return (address.format(number) for address in self._recipients)

    def _take(self) -> int | None:
        with self._lock:
            while self._left and self._begun >= self._most:
                self._lock.wait(max(0.0, min(1.0, self._deadline - time.monotonic())))
                if time.monotonic() >= self._deadline:
                    return None
            self._begun += 1
            return self._left.pop() if self._left else None

    def _work(self) -> None:
        client: Dialogue | None = None
        while (number := self._take()) is not None:
            while time.monotonic() < self._deadline:
                with self._lock:
                    self.attempts[number] = self.attempts.get(number, 0) + 1
                begun = time.monotonic()
                try:
                    if client is None:
                        client = Dialogue(self._port, self._host, timeout=30)
                        client.hello()
                    client.mail("a@example.com", *self._addresses(number), data=message(number))
                except (OSError, Unexpected):
                    if client is not None:
                        client.close()
                    client = None
                    threading.Event().wait(0.05)
                else:
                    with self._lock:
                        self.spans[number] = (begun, time.monotonic())
                        self.accepted.add(number)
                    break
        if client is not None:
            client.close()


def message(number: int) -> bytes:
    """Return the message of a number."""
    return b"Subject: %d\r\nMessage-ID: <%d@sender.example>\r\n\r\nnumber %d\r\n" % (number, number, number)
