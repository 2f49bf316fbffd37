"""Memory of the relay processes while many large messages are in flight, and with a low limit on what may be."""

from __future__ import annotations

import threading
from collections.abc import Callable

from bench import client, content, peers, usage
from bench.course import Course, Stage
from bench.peers import Peer
from bench.results import Goal, Row
from support.waiting import wait_until

_GATHER = 20.0  # seconds for which clients wait for each other before they end their message
_PER_OCTET, _BASE = 2.5, 80e6


def run(course: Course) -> Row:
    """Hold 50 messages of 10 MB in flight at once; then let them all come where little is allowed."""
    row = Row("memory", "Memory with 10 MB messages in flight")
    options = course.options
    size, clients = options.scaled(10_000_000, 2_000_000), options.scaled(50, 10)
    low = options.scaled(128_000_000, 8_000_000)
    body = content.wire(size)
    with course.row(row, 2) as stage:
        everything = peers.smtp_dup(stage.stack, stage.folder)
        _one(stage, row, everything, body, clients, size * clients, f"{clients} x {size / 1e6:g} MB", gather=_GATHER)
        assert everything.product is not None
        everything.product.stop()
        limited = peers.smtp_dup(
            stage.stack, stage.folder, name="limited", settings={"smtp.max_bytes_in_flight": str(low)}
        )
        _one(stage, row, limited, body, clients, low, f"the same, max_bytes_in_flight {low / 1e6:g} MB", gather=0)
    return row


def _one(
    stage: Stage, row: Row, peer: Peer, body: bytes, clients: int, allowed: int, label: str, *, gather: float
) -> None:
    product = peer.product
    assert product is not None
    kinds = usage.kinds(product)
    quiet = usage.resident(kinds["relay"])
    in_flight = _Highest(lambda: product.metric("smtpdup_in_flight_bytes"))
    with usage.Peak(kinds["relay"]) as relays, usage.Peak(kinds["worker"]) as workers, in_flight:
        crowd = client.run(client.all_at_once(peer.port, body, clients, gather=gather))
        wait_until(lambda: peer.arrived() == (clients, clients), 120, lambda: f"{label}: arrived: {peer.arrived()}")
        wait_until(lambda: not peer.pending(), message=f"{label}: still pending")
    for fault in (*crowd.refused, *peer.faults()):
        stage.fault(f"{label}: {fault}")
    row.add(label, "relay, peak resident", "MB", [relays.resident / 1e6])
    row.add(label, "relay, peak proportional", "MB", [relays.proportional / 1e6])
    row.add(label, "relay, before", "MB", [quiet / 1e6])
    row.add(label, "workers, peak resident", "MB", [workers.resident / 1e6])
    row.add(label, "answered 4xx", "times", [crowd.sent_away.total()])
    row.notes += [f"{label}: {count} times {text}" for text, count in crowd.sent_away.items()]
    row.add(label, "in flight, highest seen", "MB", [in_flight.value / 1e6])
    limit = (_PER_OCTET * allowed + _BASE) / 1e6
    row.goals.append(
        Goal(
            f"peak memory of the relay (shared pages once), {label}",
            relays.proportional / 1e6,
            limit,
            at_least=False,
            unit="MB",
        )
    )
    if not gather:
        row.goals.append(
            Goal("octets in flight, at their highest", in_flight.value / 1e6, allowed / 1e6, at_least=False, unit="MB")
        )
    stage.step(f"{label}: peak {relays.proportional / 1e6:,.0f} MB, highest in flight {in_flight.value / 1e6:,.0f} MB")


class _Highest:
    """Watches a value in a thread while it is open."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read = read
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.value = 0.0

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            self.value = max(self.value, self._read())
