"""Many copies from a courier to one server, enough of them that transactions begin behind the dot of the one before."""

from __future__ import annotations

import asyncio
import re

from relay.mail.destination import Destination
from support.ledger_contents import Contents, settings
from workers.delivery.courier import Courier

COUNT = 200


def deliver(contents: Contents, redis_url: str, port: int) -> None:
    """Deliver many copies to a server, as one job."""
    destination = Destination("new", "127.0.0.1", port)
    contents.register(destination)
    bodies = (b"Subject: number %d\r\n\r\n..%s\r\n" % (n, b"x" * (n * 20)) for n in range(COUNT))
    ids = [contents.pending("b@example.com", body=body, sender="a@example.com") for body in bodies]

    async def run() -> None:
        courier = Courier(settings(), destination, "worker", redis_url)
        await courier.start()
        await courier.deliver("job", ids)
        await courier.drain()

    asyncio.run(run())


def numbers(messages: list[bytes]) -> list[int]:
    """Return the numbers in the subjects, where the body is that number's."""
    found = []
    for message in messages:
        (number,) = re.findall(rb"^Subject: number (\d+)\r?$", message, re.MULTILINE)
        assert message.count(b"x" * int(number) * 20)
        assert message.count(b"Subject:") == 1
        found.append(int(number))
    return sorted(found)
