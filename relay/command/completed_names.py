"""What completion puts in for a word that is a name: of destinations, copies, groups of divergence, topics of help.

Names of backups come from the settings, and names and ids from the ledger where Redis answers at once; whatever is not
there in time is left out. It never fails, and never says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import click
from click.shell_completion import CompletionItem

from relay.command.flags import Given
from relay.mail import ids

if TYPE_CHECKING:
    from redis import Redis

DESTINATION, FAILED_ID, WAITING_ID, GROUP, TOPIC = "destination", "failed id", "waiting id", "group", "topic"
ROUTE, SERVER = "route", "server"

_ANSWER_SECONDS = 0.2  # for each answer of Redis
_READ_PATIENCE = 5.0  # seconds for the settings, which wait for nobody but a busy machine
_PATIENCE = 0.8  # seconds for Redis, also where a name server is silent
_IDS = 100  # of one destination, the oldest


class Names(click.ParamType[str]):
    """A text that is one of some names; which ones is asked for only by completion."""

    name = "text"

    def __init__(self, what: str) -> None:
        self._what = what

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so, without those that are on the command line already."""
        if self._what == TOPIC:
            return _topics(ctx, incomplete)
        given = ctx.find_object(Given)
        already = set(ctx.params.get(param.name or "") or ()) if param.nargs == -1 else set()
        found = names(given, self._what) if given else []
        return [CompletionItem(n) for n in dict.fromkeys(found) if n.startswith(incomplete) and n not in already]


def _topics(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    root = ctx.find_root().command
    within = root
    for word in ctx.params.get("topic") or ():
        within = within.commands.get(word, within) if isinstance(within, click.Group) else within
    found = within.list_commands(ctx) if isinstance(within, click.Group) else []
    extra = ["settings", "filters", "man"] if within is root else []
    return [CompletionItem(word) for word in (*extra, *found) if word.startswith(incomplete)]


def names(given: Given, what: str) -> list[str]:
    """Return names of destinations, or ids, as far as they are known in time."""
    found: list[str] = []
    have_read = threading.Event()
    thread = threading.Thread(target=_look, args=(given, what, found.append, have_read.set), daemon=True)
    thread.start()
    have_read.wait(_READ_PATIENCE)
    thread.join(_PATIENCE)
    return list(found)


def _look(given: Given, what: str, add: Callable[[str], Any], have_read: Callable[[], None]) -> None:
    with suppress(Exception):
        try:
            settings = given.settings_here(require_primary=False)
            if what == DESTINATION:
                for backup in settings.copied:
                    add(backup.name)
            if what in {ROUTE, SERVER}:
                for one in settings.route_table if what == ROUTE else settings.named:
                    add(one.name)
                return
        finally:
            have_read()
        from relay.ledger import keys as ledger_keys  # noqa: PLC0415  (redis-py: 0.1 s, which other completions do not take)
        from relay.ledger.divergence_groups import is_group  # noqa: PLC0415  (redis-py)
        from relay.redisio import embedded  # noqa: PLC0415  (redis-py: 0.1 s, which other completions do not take)
        from relay.redisio.clients import sync_client  # noqa: PLC0415  (redis-py)

        server = settings.redis if settings.redis.url else settings.redis.at(embedded.url(settings.state_dir))
        if not settings.redis.url and not embedded.socket_path(settings.state_dir).exists():
            return
        with sync_client(server, _ANSWER_SECONDS, retries=0) as connection:
            destinations = ids.names(connection.hkeys(ledger_keys.DESTINATIONS))
            if what == DESTINATION:
                for name in sorted(destinations):
                    add(name)
                return
            lists = {FAILED_ID: ledger_keys.FAILED, WAITING_ID: ledger_keys.PENDING, GROUP: ledger_keys.DIVERGENCE}
            key = lists[what]
            # What has not the form of our names becomes no part of a command line.
            is_valid: Callable[[object], bool] = is_group if what == GROUP else ids.is_id
            for name in _members(connection, [key + name for name in destinations]):
                if is_valid(name):
                    add(name)


def _members(connection: Redis, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        with suppress(Exception):  # another type of key
            yield from map(ids.text, cast("list[bytes]", connection.zrange(key, 0, _IDS - 1)))
