"""`divergence`: what a backup answers otherwise than the primary, by reason, and what an operator can do about it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from redis import Redis

from relay.cockpit import divergence as seen
from relay.cockpit import divergence_filter
from relay.cockpit.bulk_preview import copies
from relay.cockpit.conditions import Given
from relay.cockpit.divergence_details import TOP, details
from relay.cockpit.formatting import address, moment, span
from relay.cockpit.sparkline import sparkline
from relay.command.command_line import tell
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse, Trouble, read_flag
from relay.command.filters import read
from relay.command.output import GREEN, YELLOW, Column, Output
from relay.config.loader import Settings
from relay.config.types import duration
from relay.ledger import changes, divergence_groups
from relay.ledger.divergence_groups import Group
from relay.mail.text import printable
from relay.routing.table_file import BadTable

_IDS = 5
_DAY = 24  # hours of a trend


def _columns(now: float) -> list[Column]:
    """Return the columns of a table of groups."""
    return [
        Column("key", lambda g: g.key),
        Column("destination", lambda g: g.destination),
        Column("kind", lambda g: g.kind),
        Column("open/seen", lambda g: f"{g.open}/{g.seen}", numbers=True),
        Column("class", lambda g: g.reason),
        Column("reply", seen.reply, detail=True),
        Column("stage", lambda g: g.stage, detail=True),
        Column("messages", lambda g: str(g.messages), numbers=True, detail=True),
        Column("domains", _domains, numbers=True, detail=True),
        Column("first", lambda g: moment(g.first), detail=True),
        Column("last", lambda g: moment(g.last), detail=True),
        Column("24 h", lambda g: _bars(g.trend(now, _DAY)), detail=True),
        Column("state", lambda g: seen.state(g, now), detail=True,
               colour=lambda g: YELLOW if seen.state(g, now) == "open" else GREEN),
    ]  # fmt: skip


def _sums(title: str) -> list[Column]:
    return [
        Column(title, lambda r: address(r.what)),
        Column("destination", lambda r: r.destination),
        Column("recipients", lambda r: str(r.recipients), numbers=True),
        Column("reasons", lambda r: str(r.groups), numbers=True),
    ]


def listing(
    settings: Settings,
    out: Output,
    destination: str | None,
    since: str | None,
    by: str,
    kind: str | None,
    everything: bool,
    route: str,
    filters: Given,
) -> int:
    """Show what is open, or all, that meets the conditions; says no when any of it is open and not acknowledged."""
    chosen = read(filters)
    with ledger_of(settings) as connection:
        now = changes.now(connection)
        begin = now - read_flag("--since", duration().read, since) if since else 0.0
        groups = seen.chosen(connection, destination, since=begin, kind=kind, everything=everything)
        groups = divergence_filter.narrowed(connection, groups, chosen)
        if route:
            groups = _on_route(connection, settings, groups, route)
        nothing = "Nothing is open." if not everything else "Nothing has been refused or put off."
        if by != "reason":
            out.rows(seen.summed(connection, groups, by), _sums(by), nothing=nothing)
        elif out.as_json:
            for group in groups:
                out.object(_as_object(connection, group, now))
        else:
            out.rows(groups, _columns(now), nothing=nothing)
    return NO if any(group.counts(now) for group in groups) else WELL


def _on_route(connection: Redis, settings: Settings, groups: Sequence[Group], route: str) -> list[Group]:
    """Return those about recipients of a route. Raises Misuse, Trouble."""
    try:
        return divergence_filter.on_route(connection, settings, groups, route, tell)
    except divergence_filter.NoRoute as error:
        raise Misuse(f"--route: {printable(str(error))}") from error
    except (BadTable, OSError) as error:
        raise Trouble(f"a table cannot be read: {error}") from error


def show(settings: Settings, out: Output, key: str, destination: str | None) -> int:
    """Show one reason: the text as it came, examples with both servers' words, whom it concerns, what to do."""
    with ledger_of(settings) as connection:
        group = _one(connection, key, destination)
        found = details(connection, settings, group)
        now = found.now
        if out.as_json:
            out.object({
                **_as_object(connection, group, now),
                "examples": [asdict(example) for example in found.examples],
                "whom": [{"recipient": name, "count": count} for name, count in found.whom],
            })  # fmt: skip
            return WELL
    pairs = [
        ("key", group.key),
        ("destination", group.destination),
        ("kind", group.kind + (", in words of ours" if group.own else "")),
        ("stage", group.stage),
        ("class", group.reason),
        ("what to do", group.advice),
        ("reply", seen.reply(group)),
        *((("as it came", group.reply),) if group.reply else ()),
        ("recipients", f"{group.open} open of {group.seen} seen" + (f"; {found.endings}" if found.endings else "")),
        ("messages", str(group.messages)),
        ("first", moment(group.first)),
        ("last", moment(group.last)),
        ("24 h", _bars(group.trend(now, _DAY))),
        ("state", seen.state(group, now)),
        *_acknowledgement(group, now),
        *_listed("domains", found.domains, found.more_domains),
        *_listed("whom", found.whom, found.more_whom),
    ]
    out.pairs(pairs)
    for example in found.examples:
        out.line("")
        out.pairs((
            ("example", f"{example.id}  {moment(example.at)}  {example.stands}"),
            ("from", address(example.sender)),
            *((("came", origin),) if (origin := example.origin(now)) else ()),
            ("to", ", ".join(example.recipients[:TOP]) or "-"),
            ("primary", example.primary),
            (group.destination[:12], example.backup),
        ))  # fmt: skip
    return WELL


def acknowledge(
    settings: Settings, out: Output, key: str, destination: str | None, note: str, time: str, domains: tuple[str, ...]
) -> int:
    """Let a reason not count for a time."""
    seconds = read_flag("--for", duration().read, time)
    with ledger_of(settings) as connection:
        group = _one(connection, key, destination)
        ack = seen.acknowledge(connection, group, note, seconds, domains)
        group = _one(connection, key, group.destination)
    if out.as_json:
        out.object({"acknowledged": group.key, "destination": group.destination, "until": ack.until, "note": ack.note})
    else:
        out.line(f"{group.key} does not count until {moment(ack.until)}, or until there is more of it than now.")
        if why := group.reopened(ack.at):
            out.line(f"It stays open, though: {why}.")
    return WELL


def unacknowledge(settings: Settings, out: Output, key: str, destination: str | None, note: str) -> int:
    """Let a reason count again; says no when it did all the time."""
    with ledger_of(settings) as connection:
        group = _one(connection, key, destination)
        was = seen.unacknowledge(connection, group, note)
    text = f"{group.key} counts again." if was else f"{group.key} was not acknowledged."
    out.say(text, {"unacknowledged": group.key, "destination": group.destination, "was": was})
    return WELL if was else NO


def retry(settings: Settings, out: Output, key: str, destination: str | None) -> int:
    """Have the failed copies of a reason tried again now."""
    with ledger_of(settings) as connection:
        group = _one(connection, key, destination)
        count = seen.retry(connection, settings, group)
    out.say(f"{copies(count)} will be tried again now.", {"retried": count})
    return WELL


def _one(connection: Redis, key: str, destination: str | None) -> Group:
    found = seen.find(connection, key, destination)
    if not found:
        raise Trouble(f"no such reason: {key}; `smtp-dup divergence --all` lists them")
    if len(found) > 1:
        names = ", ".join(group.destination for group in found)
        raise Misuse(f"{key} is a reason of several destinations: give --destination, one of {names}")
    return found[0]


def _as_object(connection: Redis, group: Group, now: float) -> dict[str, Any]:
    ids = [message_id for message_id, _ in divergence_groups.examples(connection, group.destination, group.key)]
    return {
        **asdict(group),
        "class": group.reason,
        "advice": group.advice,
        "state": seen.state(group, now).partition(" ")[0],
        "reopened": group.reopened(now),
        "trend": group.trend(now, _DAY),
        "examples": ids[-_IDS:],
    }


def _acknowledgement(group: Group, now: float) -> list[tuple[str, str]]:
    if group.ack is None:
        return []
    pairs = [("by", f"{group.ack.by}, {moment(group.ack.at)}: {group.ack.note}")]
    if why := group.reopened(now):
        pairs.append(("open again", why))
    else:
        pairs.append(("ends in", span(group.ack.until - now)))
    return pairs


def _domains(group: Group) -> str:
    return str(len(group.domains)) + ("+" if group.more_domains else "")


def _listed(title: str, named: Sequence[tuple[str, int]], more: int) -> list[tuple[str, str]]:
    counts = [*named, *([("others", more)] if more else [])]
    return [("" if n else title, f"{count}  {address(name)}") for n, (name, count) in enumerate(counts)]


def _bars(values: list[int]) -> str:
    return sparkline(values, encoding=sys.stdout.encoding or "ascii").rstrip() or "-"
