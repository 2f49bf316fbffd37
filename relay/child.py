"""What a forked child process knows of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    pass


def _nobody() -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True, slots=True)
class ChildContext:
    """What a forked child knows of itself. An instance is ``<pid>.<start, ms>``, unique on its host.

    ``living`` returns the instances of this name that run, those of an earlier generation that drain too; None while
    that cannot be told. ``ready`` is to be called once this process does its work.
    """

    name: str
    instance: str
    predecessor: str | None = None  # the instance that this one replaces
    generation: int = 1  # of its settings: one more with every reload
    seat: int = 0  # its part of the memory that the processes of a name share, its own while it lives
    ready: Callable[[], None] = _nothing
    living: Callable[[], frozenset[str] | None] = _nobody
