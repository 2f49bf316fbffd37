"""What a forked child process knows of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChildContext:
    """What a forked child knows of itself. An instance is ``<pid>.<start, ms>``, unique on its host."""

    name: str
    instance: str
    predecessor: str | None = None  # the instance that this one replaces
