"""The mail that goes on in the demo: a message now and then, among them some that the two servers answer otherwise.

So whoever has opened the page has something to look at. What cannot be sent is not sent again: the relay
may be on its way to another primary, or to its end.
"""

from __future__ import annotations

import smtplib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import cycle, zip_longest

from relay.demo.samples import Sample

EVERY = 7.0  # seconds
_TIMEOUT = 10.0

_MAIL = (
    Sample("Lunch on Friday?", ("alice@example.com", "bob@example.com")),
    Sample("Your invoice", ("erin@example.com",)),  # new does not know her
    Sample("Minutes of the meeting", ("carol@example.com",), attachment=bytes(range(256)) * 40),
    Sample("The weekly report", ("grace@example.com",)),  # her mailbox is full at new
    Sample("Re: Lunch on Friday?", ("alice@example.com",)),
    Sample("A newsletter", ("bob@example.com", "erin@example.com")),  # one of two
    Sample("Photographs", ("frank@example.com",), attachment=bytes(range(256)) * 300),
    Sample("To nobody", ("zoe@example.com",)),  # neither server takes it
)
_TO_THE_SHOP = (
    Sample("An order", ("anna@shop.example",)),
    Sample("Parcel on its way", ("ben@shop.example", "carla@shop.example")),
    Sample("To both servers", ("bob@example.com", "ben@shop.example")),  # the second one is to be sent by itself
    Sample("Your order", ("ida@shop.example",)),  # one of those who are at new, once it has a quarter of the mailboxes
)


def endless(*, routes: bool) -> Iterator[Sample]:
    """Yield what is sent, over and over, numbered by its round; with ``routes`` also to who has another server."""
    mail = [one for pair in zip_longest(_MAIL, _TO_THE_SHOP if routes else ()) for one in pair if one]
    for number, sample in enumerate(cycle(mail)):
        turn = number // len(mail) + 1
        yield replace(sample, title=sample.title if turn == 1 else f"{sample.title} ({turn})", new=[])


class Traffic:
    """Sends one message at a time, when it is time for it; ``send`` is how."""

    def __init__(
        self,
        address: tuple[str, int],
        programme: list[Sample],
        send: Callable[[smtplib.SMTP, Sample], str],
        *,
        routes: bool = False,
        every: float = EVERY,
    ) -> None:
        self._address = address
        self._programme = programme
        self._send = send
        self._every = every
        self._mail = endless(routes=routes)
        self._next = time.monotonic() + every

    def go_on(self) -> None:
        """Send the next message, if it is time."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._every
        sample = next(self._mail)
        self._programme.append(sample)
        try:
            with smtplib.SMTP(*self._address, local_hostname="client.example.org", timeout=_TIMEOUT) as client:
                sample.heard = self._send(client, sample)
        except (OSError, smtplib.SMTPException):
            with suppress(ValueError):
                self._programme.remove(sample)
