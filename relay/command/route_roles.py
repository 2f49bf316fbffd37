"""`route weight` and `route reset`: how much of a route each server answers for, and back to what the settings say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from redis import Redis

from relay.cockpit import changeover
from relay.command.connection import ledger_of
from relay.command.decision import carry_out, confirmed, nothing_to_do, seconds_of, show_plan
from relay.command.exit_status import NO, WELL, Misuse
from relay.command.output import Output
from relay.config.loader import Settings
from relay.mail.text import printable
from relay.topology import promotion, route_roles
from relay.topology.promotion import Impossible, Plan


def weight(
    settings: Settings,
    out: Output,
    route: str,
    weights: Sequence[str],
    dry_run: bool,
    wait: str,
    now: bool,
    reason: str,
    yes: bool,
) -> int:
    """Share the mail of a route by weights from now on."""
    shares = _shares(weights)
    return _decide(
        settings, out, lambda c: promotion.plan_weights(c, settings, route, shares), dry_run, wait, now, reason, yes
    )


def reset(
    settings: Settings, out: Output, route: str, dry_run: bool, wait: str, now: bool, reason: str, yes: bool
) -> int:
    """Let a route be as the settings say, whatever was decided for it."""
    return _decide(settings, out, lambda c: promotion.plan_reset(c, settings, route), dry_run, wait, now, reason, yes)


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


def _decide(
    settings: Settings,
    out: Output,
    plan: Callable[[Redis], Plan],
    dry_run: bool,
    wait: str,
    now: bool,
    reason: str,
    yes: bool,
) -> int:
    seconds = seconds_of(wait)
    with ledger_of(settings) as connection:
        try:
            made = plan(connection)
        except Impossible as error:
            raise Misuse(str(error)) from error
        if made.agree:
            return nothing_to_do(out, made)
        verdict = changeover.verdict(connection, settings, made)
        show_plan(out, made, verdict)
        if dry_run:
            return WELL
        if not yes and not confirmed(made):
            return NO
        details = {"readiness": verdict.summary} if verdict else {}
        return carry_out(connection, out, made, reason, details, seconds, at_once=now)
