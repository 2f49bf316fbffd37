"""A long sequence in pieces of one size: what goes to Redis in one command, or one transaction, is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

S = TypeVar("S", bound=Sequence[Any])


def batched(items: S, size: int) -> Iterator[S]:
    """Yield slices of so many items, the last one of the rest."""
    for start in range(0, len(items), size):
        yield cast("S", items[start : start + size])
