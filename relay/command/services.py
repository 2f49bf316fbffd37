"""`up`, `relay`, `workers` and `demo`: what runs until it is told to stop."""

from __future__ import annotations

from relay.command.flags import Given
from relay.daemon import services, start


def up(given: Given) -> int:
    """Run relay and workers, and a Redis unless the settings name one."""
    return _run(given, start.UP)


def relay(given: Given) -> int:
    """Run the relay."""
    return _run(given, start.RELAY)


def workers(given: Given) -> int:
    """Run the delivery to the backups."""
    return _run(given, start.WORKERS)


def _run(given: Given, role: start.Role) -> int:
    settings = given.settings(require_primary=role.relays)
    return services.run(settings, role, read=given.reader(require_primary=role.relays))


def demo(colour: str, *, routes: bool) -> int:
    """Run the demo until Ctrl-C."""
    from relay.demo import main  # noqa: PLC0415  (its servers: nothing that `up` needs in its memory)

    return main.run(colour, routes=routes)
