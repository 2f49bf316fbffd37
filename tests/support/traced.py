"""A trace without a product: events sent as the processes send them, collected into files, at a clock of the test."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from relay import private_files
from relay.config.model import TraceSettings
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.stopping import StopEvent
from relay.trace import emitter, events, files
from relay.trace.collector import Collector
from relay.trace.events import Wire
from relay.trace.life import MessageLife
from relay.trace.lookup import Query, Unseen, find

OLD_SAID = Reply.of(250, "2.0.0 Ok: queued as 4XyzAB12")


class Traced:
    """Sends events, has them written, and looks them up."""

    def __init__(self, state_dir: Path, settings: TraceSettings | None = None, role: str = "up") -> None:
        self.state_dir = state_dir
        self.folder = files.folder_of(state_dir)
        self.now = time.time()
        self.ids = IdSource(lambda: self.now)
        self.reading, self.writing = emitter.channel()
        self.collector = Collector(
            settings or TraceSettings(), state_dir, role, self.reading, min_free=0, clock=lambda: self.now
        )

    def close(self) -> None:
        stop = StopEvent()
        stop.set()
        self.collector.run(stop)  # takes what is there, and closes its file
        for end in (self.reading, self.writing):
            end.close()

    def send(self, *wires: Wire) -> None:
        for wire in wires:
            wire[2] = round(self.now * 1000)
            self.writing.send(json.dumps([wire]).encode())

    def write(self, *wires: Wire) -> None:
        self.send(*wires)
        self.collector.collect()
        self.collector.write()

    def received(
        self,
        sender: str = "alice@a.example",
        recipients: Sequence[str] = ("bob@b.example",),
        *,
        outcome: str = events.ACCEPTED,
        refused: Sequence[tuple[str, Reply, bool]] = (),
        message_id: str = "<1@a.example>",
        copies: Sequence[str] = ("new",),
        reply: Reply = OLD_SAID,
        stage: str = events.IN_REDIS,
        refused_at: str = "",
    ) -> Wire:
        """Return the event of a message."""
        envelope = Envelope(
            id=self.ids.next(),
            sender=sender,
            recipients=tuple(map(Recipient, recipients)),
            received_at=self.now,
            size=1234,
            client_address="192.0.2.7",
            client_helo="mx.a.example",
            destinations=tuple(copies),
            message_id=message_id,
        )
        (wire,) = events.received(
            outcome,
            envelope,
            refused,
            stage,
            0.002,
            "old",
            0.018,
            reply,
            refused_at,
            Reply.of(250, "2.1.0 Ok"),
            [Reply.of(250, "2.1.5 Ok")] * len(recipients),
        )
        return wire

    def find(self, *what: str, unseen: Unseen | None = None, **rest: object) -> list[MessageLife]:
        """Look up what an operator types."""
        return list(find(Query.of(what, **rest), self.folder, unseen=unseen))


def delivered(message_id: str, *, destination: str = "new", attempt: int = 1, reply: Reply | None = None) -> Wire:
    """Return the event of a delivery to one recipient."""
    said = reply or Reply.of(250, "2.0.0 Ok: queued as NEW77abc")
    return events.tried(message_id, destination, attempt, 0.03, [(events.DELIVERED, 1, (), said)])


def fill(folder: Path, hours: int, messages: int, *, until: float) -> IdSource:
    """Write files of so many hours with so many delivered messages each, the last hour's at ``until``.

    Message n of hour h is from ``sender<n % 5000>@s<n % 50>.example`` to ``user<h>.<n>@d<n % 200>.example``, with the
    Message-ID ``<h.n@s.example>`` and the queue ids ``OLD<h>x<n>`` and ``NEW<h>x<n>``. Returns the source of their ids.
    """
    private_files.folder(folder)
    now = [0.0]
    ids = IdSource(lambda: now[0])
    for h in range(hours):
        begin = int(until) // files.HOUR * files.HOUR - (hours - 1 - h) * files.HOUR
        opened = files.open_to_write(files.named(folder, begin, "up", 1))
        for start in range(0, messages, _FILLED):
            rows = []
            for n in range(start, min(messages, start + _FILLED)):
                now[0] = begin + n * 3600.0 / messages
                rows.append(_row(ids.next(), h, n, now[0]))
            opened.add(rows)
        opened.finish()
    return ids


_FILLED = 20_000


def _row(message_id: str, h: int, n: int, at: float) -> files.Row:
    sender, recipient = f"sender{n % 5000}@s{n % 50}.example", f"user{h}.{n}@d{n % 200}.example"
    old, new = f"OLD{h}x{n}", f"NEW{h}x{n}"
    ms = round(at * 1000)
    data = (
        f'[["m","{message_id}",{ms},"accepted","{sender}",["{recipient}"],[],"192.0.2.7","mx.s.example",4096,'
        f'"<{h}.{n}@s.example>","redis",2100,"old",18400,"250 2.0.0 Ok: queued as {old}","","250 2.1.0 Ok",'
        f'["250 2.1.5 Ok"],["new"],false,1],'
        f'["d","{message_id}",{ms + 200},"new",1,31200,[["delivered",1,[],"250 2.0.0 Ok: queued as {new}"]],null]]'
    )
    found = [
        f"i{message_id}", f"f{sender}", f"Fs{n % 50}.example", f"t{recipient}", f"Td{n % 200}.example",
        f"m{h}.{n}@s.example", f"q{old}", f"q{new}",
    ]  # fmt: skip
    return data.encode(), found
