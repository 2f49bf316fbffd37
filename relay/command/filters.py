"""The conditions on a command line as the one filter, and what a word that changes copies wants of them."""

from __future__ import annotations

from collections.abc import Sequence

from relay.cockpit import conditions
from relay.cockpit.conditions import BadCondition, Given
from relay.command.exit_status import Misuse
from workers.queues.selection import Filter


def read(given: Given, ids: Sequence[str] = ()) -> Filter:
    """Read a filter from a command line. Raises Misuse."""
    try:
        return conditions.read(given, ids)
    except BadCondition as error:
        raise Misuse(f"--{error.name}: {error}") from None


def read_for_change(given: Given, ids: Sequence[str], everything: bool) -> Filter:
    """Read the filter of a word that changes copies: nobody changes all by leaving something out. Raises Misuse."""
    chosen = read(given, ids)
    if ids and everything:
        raise Misuse("give the ids of messages, or --all, not both")
    if chosen.is_empty and not everything:
        raise Misuse("give ids, a filter such as --destination or --code (smtp-dup help filters), or --all")
    return chosen
