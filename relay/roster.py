"""The workers that no setting asks for: a destination that is no backup any more is served while it has copies.

Its copies may come at any time: from a spool, from another host's relay, by `queue move` or `failed retry`. So the
supervisor asks every few seconds, with one connection and one round trip or two. A Redis that does not answer changes
nothing: whoever works goes on. Whom another host's workers serve within seconds is left to them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from relay import dispatch, ledger, maillog, named
from relay.envelope import Destination
from relay.processes import Child
from relay.redis_clients import sync_client
from relay.settings import Settings, resolve_password

_OLD = 5.0  # seconds that a copy has been pending for when nobody seems to serve it
_LOOKS = 2  # so many in a row must agree before a worker starts for a job alone, and before one ends
_SECONDS = 1.0  # for Redis to answer: meanwhile the supervisor does nothing else


class Roster:
    """Call it for the workers that there should be now, None when that cannot be found out."""

    def __init__(self, settings: Settings, workers_for: Callable[[Destination], Sequence[Child]]) -> None:
        self._settings = settings
        self._workers_for = workers_for
        self._named = named.remember(settings.state_dir, settings.backups)
        self._configured = {backup.name for backup in settings.backups}
        self._serving: dict[str, Sequence[Child]] = {}
        self._looks: dict[str, int] = {}  # in a row that spoke for a change

    def __call__(self) -> Sequence[Child] | None:
        try:
            with sync_client(self._settings.redis, _SECONDS, retries=0) as client:
                self._look(client)
        except (RedisError, OSError):
            return None
        return [child for children in self._serving.values() for child in children]

    def _look(self, client: Redis) -> None:
        known = cast("list[bytes]", client.hkeys(ledger.DESTINATIONS))
        names = {name.decode() for name in known} - self._configured
        if not names:
            return
        with client.pipeline(transaction=False) as pipe:
            pipe.time()
            for name in sorted(names):
                pipe.zrange(ledger.PENDING + name, 0, 0, withscores=True)
                pipe.llen(dispatch.queue(client, name).key)
            (seconds, _), *found = pipe.execute()
        for name, oldest, jobs in zip(sorted(names), found[::2], found[1::2], strict=True):
            age = seconds - oldest[0][1] if oldest else None
            self._judge(client, name, age, jobs)

    def _judge(self, client: Redis, name: str, age: float | None, jobs: int) -> None:
        is_needed = age is not None or jobs > 0
        if is_needed == (name in self._serving):
            self._looks.pop(name, None)
            return
        self._looks[name] = self._looks.get(name, 0) + 1
        if is_needed and ((age or 0) > _OLD or self._looks[name] >= _LOOKS):
            self._begin(client, name)
        elif not is_needed and self._looks[name] >= _LOOKS:
            maillog.notice("info", "no copies are left: its worker ends", destination=name)
            del self._serving[name]
            del self._looks[name]

    def _begin(self, client: Redis, name: str) -> None:
        text: Any = client.hget(ledger.DESTINATIONS, name)
        if text is None:
            return
        maillog.notice(
            "warning",
            "no backup any more, but copies are left: a worker serves it until there are none",
            destination=name,
            pending=client.zcard(ledger.PENDING + name),
        )
        self._serving[name] = self._workers_for(_with_password(Destination.from_json(text), self._named))
        self._looks.pop(name, None)


def _with_password(destination: Destination, known: frozenset[str]) -> Destination:
    """Resolve the password of a destination from the ledger, which only has the reference; see named.py."""
    if destination.password_from and destination.to_json() not in known:
        text = "its password is not looked up: these settings have never named it; add it as a backup to deliver"
        maillog.notice("warning", text, destination=destination.name, password_from=destination.password_from)
    elif destination.password_from:
        try:
            return replace(destination, password=resolve_password(destination.password_from, os.environ))
        except ValueError as error:
            maillog.notice("warning", "password_from", destination=destination.name, reason=str(error))
    return destination
