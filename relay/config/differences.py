"""How two settings differ, option by option, as people see it: no secret shows, and a changed one is said to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from relay.config.model import Settings
from relay.config.options import OPTIONS
from relay.config.routes import Route
from relay.config.shown import in_words
from relay.mail.destination import Destination

_PRIMARY, _BACKUPS = "relay.destination_primary", "relay.destination_backups"
_OF_ALL = {"messages_per_connection", "connection_age"}  # of the primary: options of their own
_NONE = "none"


class Difference(NamedTuple):
    """An option that is not the same, or a field of a server; "none" stands for a server that is not there."""

    key: str
    before: str
    after: str
    takes_restart: bool = False


def differences(before: Settings, after: Settings) -> list[Difference]:
    """Return what is not the same, in the order of the options, the backups last."""
    found: list[Difference] = []
    for option in OPTIONS:
        if option.key in {_PRIMARY, _BACKUPS}:
            continue
        old, new = before.value(option.key), after.value(option.key)
        if old != new:
            shown = option.kind.show(old), option.kind.show(new)
            found.append(Difference(option.key, *_told_apart(*shown), option.takes_restart))
    found += _of_server(_PRIMARY, before.primary, after.primary, _OF_ALL)
    if before.primary and after.primary:  # else the primary's own row says so
        apart = {n for n in Destination.__slots__ if getattr(before.primary, n) != getattr(after.primary, n)}
        found += _of_server("relay.demoted", before.demoted, after.demoted, apart | {"name", "host", "port"})
    for kind in ("backup", "server"):
        olds, news = ({one.name: one for one in settings.value(f"{kind}s")} for settings in (before, after))
        for name in dict.fromkeys((*olds, *news)):
            found += _of_server(f"{kind}.{name}", olds.get(name), news.get(name), frozenset())
    return found + list(_of_routes(before.route_table, after.route_table))


def _of_routes(before: Sequence[Route], after: Sequence[Route]) -> Iterator[Difference]:
    olds, news = ({route.name: route for route in routes} for routes in (before, after))
    for name in dict.fromkeys((*olds, *news)):
        old, new = olds.get(name), news.get(name)
        if old != new:
            shown = (route.in_words() if route else _NONE for route in (old, new))
            yield Difference(f"route.{name}", *_told_apart(*shown))
    if list(olds) != list(news) and sorted(olds) == sorted(news):
        yield Difference("route", ", ".join(olds), ", ".join(news))


def _of_server(
    key: str, before: Destination | None, after: Destination | None, apart: set[str] | frozenset[str]
) -> Iterator[Difference]:
    if before is None or after is None:
        if before is not after:
            yield Difference(key, in_words(before) if before else _NONE, in_words(after) if after else _NONE)
        return
    for name in Destination.__slots__:
        old, new = getattr(before, name), getattr(after, name)
        if old != new and name not in apart:
            shown = ("***", "***") if name == "password" else (_shown(old), _shown(new))
            yield Difference(f"{key}.{name}", *_told_apart(*shown))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "all"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _told_apart(before: str, after: str) -> tuple[str, str]:
    """Return both; where they look the same, as masked secrets do, the later one says that it is another."""
    return before, f"{after} (another)" if before == after else after
