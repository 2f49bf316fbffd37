"""`up`, `relay`, `workers` and `demo`: what runs until it is told to stop."""

from __future__ import annotations

from relay import composition
from relay.settings import Settings


def up(settings: Settings) -> int:
    """Run relay and workers, and a Redis unless the settings name one."""
    return composition.run(settings, composition.UP)


def relay(settings: Settings) -> int:
    """Run the relay."""
    return composition.run(settings, composition.RELAY)


def workers(settings: Settings) -> int:
    """Run the delivery to the backups."""
    return composition.run(settings, composition.WORKERS)


def demo() -> int:
    """Run the demo until Ctrl-C."""
    from relay import demo as show  # noqa: PLC0415  (its servers: nothing that `up` needs in its memory)

    return show.run()
