"""How long after `smtp-dup up` the first client is greeted, from an empty state folder."""

from __future__ import annotations

import socket
import time

from bench import peers
from bench.course import Course
from bench.results import Goal, Row
from support.product import Product

_PATIENCE = 60.0


def run(course: Course) -> Row:
    """Start `up` and knock until it says 220."""
    row = Row("start", "Start of `up`")
    options = course.options
    times = []
    with course.row(row, options.rounds) as stage:
        for turn in range(options.rounds):
            peer = peers.smtp_dup(stage.stack, stage.folder, name=f"start-{turn}", start=False)
            assert peer.product is not None
            begun = time.monotonic()
            peer.product.start(wait=False)
            times.append(_greeted(peer.product) - begun)
            peer.product.wait_ready()
            if status := peer.product.stop():
                stage.fault(f"`up` ended with {status}")
            stage.step(f"round {turn + 1}: {times[-1]:.2f} s")
        row.add("smtp-dup up", "until it accepts mail", "s", times)
        row.goals = [
            Goal(
                "start of `up` until it accepts mail",
                row.median("smtp-dup up", "until it accepts mail"),
                2,
                at_least=False,
                unit="s",
            )
        ]
    return row


def _greeted(product: Product) -> float:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", product.smtp_port), timeout=_PATIENCE) as client:
                if client.recv(100).startswith(b"220"):
                    return time.monotonic()
        except OSError:
            pass
        if not product.is_running:
            break
        time.sleep(0.005)
    raise AssertionError(f"`up` does not greet:\n{product.log[-2000:]}")
