"""`up`, `relay`, `workers` and `demo`: what runs until it is told to stop."""

from __future__ import annotations

from relay.config.loader import Settings
from relay.daemon import services, start


def up(settings: Settings) -> int:
    """Run relay and workers, and a Redis unless the settings name one."""
    return services.run(settings, start.UP)


def relay(settings: Settings) -> int:
    """Run the relay."""
    return services.run(settings, start.RELAY)


def workers(settings: Settings) -> int:
    """Run the delivery to the backups."""
    return services.run(settings, start.WORKERS)


def demo(colour: str) -> int:
    """Run the demo until Ctrl-C."""
    from relay.demo import main  # noqa: PLC0415  (its servers: nothing that `up` needs in its memory)

    return main.run(colour)
