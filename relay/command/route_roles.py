"""`route weight` and `route reset`: how much of a route each server answers for, and back to what the settings say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from relay.command.decision import How, decide
from relay.command.exit_status import Misuse
from relay.command.output import Output
from relay.config.loader import Settings
from relay.mail.text import printable
from relay.topology import promotion, route_roles


def weight(settings: Settings, out: Output, route: str, weights: Sequence[str], **how: Unpack[How]) -> int:
    """Share the mail of a route by weights from now on."""
    shares = _shares(weights)
    return decide(settings, out, lambda redis: promotion.plan_weights(redis, settings, route, shares), **how)


def reset(settings: Settings, out: Output, route: str, **how: Unpack[How]) -> int:
    """Let a route be as the settings say, whatever was decided for it."""
    return decide(settings, out, lambda redis: promotion.plan_reset(redis, settings, route), **how)


def _shares(words: Sequence[str]) -> dict[str, float]:
    """Read "a=1 b=9". Raises Misuse."""
    found: dict[str, float] = {}
    for word in words:
        name, _, text = word.rpartition("=")
        if name in found:
            raise Misuse(f"{printable(name)} is named twice")
        try:
            found[name] = route_roles.weight(text if name else "")
        except ValueError as error:
            raise Misuse(f"expected NAME=WEIGHT with a weight of 0 or more, not {printable(word)}") from error
    return found
