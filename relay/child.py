"""The context that the supervisor gives to a forked child process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from relay.stopping import StopEvent

_SIGN_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ChildContext:
    """The name and place of a child process. An instance is ``<pid>.<start, ms>``, unique on its host.

    ``living`` returns the running instances of this name, including those of an earlier generation that drain; None
    while that is unknown. The child calls ``ready`` once it does its work, and ``lives`` once a second from then on.
    """

    name: str
    instance: str
    predecessor: str | None = None  # the instance that this one replaces
    generation: int = 1  # of the settings: incremented by each reload
    seat: int = 0  # distinguishes the processes of one name in shared memory
    ready: Callable[[], None] = lambda: None
    lives: Callable[[], None] = lambda: None
    living: Callable[[], frozenset[str] | None] = frozenset


async def keep_living_in_loop(lives: Callable[[], None]) -> None:
    """Give signs of life as long as this event loop turns; runs until cancelled."""
    while True:
        lives()
        await asyncio.sleep(_SIGN_SECONDS)


def keep_living(context: ChildContext, stop: StopEvent) -> None:
    """Give signs of life until a stop: the duty of a thread beside those that do the work."""
    while not stop.wait(_SIGN_SECONDS):
        context.lives()
