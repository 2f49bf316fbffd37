"""The context that the supervisor gives to a forked child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def _nothing() -> None:
    pass


def _nobody() -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True, slots=True)
class ChildContext:
    """The name and place of a child process. An instance is ``<pid>.<start, ms>``, unique on its host.

    ``living`` returns the running instances of this name, including those of an earlier generation that drain; None
    while that is unknown. The child calls ``ready`` once it does its work.
    """

    name: str
    instance: str
    predecessor: str | None = None  # the instance that this one replaces
    generation: int = 1  # of the settings: incremented by each reload
    seat: int = 0  # distinguishes the processes of one name in shared memory
    ready: Callable[[], None] = _nothing
    living: Callable[[], frozenset[str] | None] = _nobody
