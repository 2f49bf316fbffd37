"""Which messages come so densely that their copies are left to jobs."""

from __future__ import annotations

import pytest

from relay.handover.density import MOST, Density
from relay.ledger.rq_jobs import GATHER_SECONDS


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("rate", "left_to_jobs"), [(1, False), (50, False), (99, False), (130, True), (2000, True)])
def test_a_steady_stream(rate: int, left_to_jobs: bool) -> None:
    """Below ten in the time that a job gathers everything is handed over; above, nothing but the beginning."""
    clock = Clock()
    density = Density(clock)
    dense = []
    for _ in range(rate * 3):
        dense.append(density.is_high())
        clock.now += 1 / rate
    assert all(dense[2 * MOST :]) if left_to_jobs else not any(dense)
    assert not any(dense[:MOST])


def test_a_burst_is_forgotten() -> None:
    """After a burst it takes two spans without mail, at most."""
    clock = Clock()
    density = Density(clock)
    assert [density.is_high() for _ in range(100)] == [False] * MOST + [True] * (100 - MOST)
    clock.now += 2 * GATHER_SECONDS
    assert not density.is_high()
