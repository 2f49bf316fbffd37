"""The workers that no setting asks for: of a primary that was demoted, and of who is no backup any more but has copies.

A demoted primary is a backup like the others, from the moment at which another is promoted.

Its copies may come at any time: from a spool, from another host's relay, by `queue move` or `failed retry`. So the
supervisor asks every few seconds, with one connection and one round trip or two. A Redis that does not answer changes
nothing: whoever works goes on. Whom another host's workers serve within seconds is left to them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from relay import maillog
from relay.config.destinations import resolve_password
from relay.config.loader import Settings
from relay.daemon import known_passwords
from relay.daemon.slots import Child
from relay.ledger import keys, registry, rq_jobs
from relay.ledger.continuity import Continuity
from relay.mail import ids
from relay.mail.destination import Destination
from relay.mail.stored import moment
from relay.redisio.clients import sync_client
from relay.topology import moving, promotion
from relay.topology.roles import copied_now, may_be_copied

_OLD = 5.0  # seconds that a copy has been pending for when nobody seems to serve it
_LOOKS = 2  # so many in a row must agree before a worker starts for a job alone, and before one ends
_SECONDS = 1.0  # for Redis to answer: meanwhile the supervisor does nothing else


class RetiredDestinations:
    """Call it for the workers that there should be now, None when that cannot be found out."""

    def __init__(
        self,
        settings: Settings,
        workers_for: Callable[[Destination], Sequence[Child]] | None,
        continuity: Continuity | None = None,
        former: Iterable[Destination] = (),
    ) -> None:
        """Without ``workers_for`` it only sees that the ledger is the one that we knew, as it does anyway.

        ``former`` are those that this process has had as backups, with the passwords that the ledger does not have.
        """
        self._settings = settings
        self._workers_for = workers_for
        self._continuity = continuity or Continuity(settings.copied)
        self._undefined: set[str] = set()  # told once
        self._is_told = False  # of what makes no sense
        self._named = known_passwords.remember(settings.state_dir, (*settings.copied, *may_be_copied(settings)))
        self._configured = {backup.name for backup in settings.copied}
        self._former = {backup.to_json(): backup for backup in former}
        self._is_registered = False  # as long as the ledger may not know the backups of new settings
        self._serving: dict[str, Sequence[Child]] = {}
        self._looks: dict[str, int] = {}  # in a row that spoke for a change

    def __call__(self) -> Sequence[Child] | None:
        try:
            with sync_client(self._settings.redis, _SECONDS, retries=0) as client:
                with contextlib.suppress(ResponseError):  # full, or not to be written: that is told elsewhere
                    self._continuity.look(client)
                    if self._workers_for and not self._is_registered:
                        registry.register_now(client, self._settings.copied)
                        self._is_registered = True
                if self._workers_for:
                    self._look(client, self._workers_for)
        except (RedisError, OSError):
            return None
        except Exception as error:  # whatever Redis holds, who watches over all the others goes on
            if not self._is_told:
                self._is_told = True
                reason = f"{type(error).__name__}: {error}"
                maillog.notice("error", "what Redis knows of destinations makes no sense", reason=reason)
            return None
        return [child for children in self._serving.values() for child in children]

    def _look(self, client: Redis, workers_for: Callable[[Destination], Sequence[Child]]) -> None:
        known = cast("list[bytes]", client.hkeys(keys.DESTINATIONS))
        names = set(ids.names(known)) - self._configured - self._serve_the_demoted(client, workers_for)
        if not names:
            return
        with client.pipeline(transaction=False) as pipe:
            pipe.time()
            for name in sorted(names):
                pipe.zrange(keys.PENDING + name, 0, 0, withscores=True)
                pipe.llen(rq_jobs.queue(client, name).key)
            (seconds, _), *found = pipe.execute()
        for name, oldest, jobs in zip(sorted(names), found[::2], found[1::2], strict=True):
            age = seconds - moment(oldest[0][1]) if oldest else None
            if self._judge(name, age, jobs):
                self._begin(client, name, workers_for)

    def _serve_the_demoted(self, client: Redis, workers_for: Callable[[Destination], Sequence[Child]]) -> set[str]:
        """See that who gets copies since a promotion, or since mailboxes moved, has workers; returns their names."""
        topology = promotion.standing(client, self._settings)
        now = {server.name: server for server in copied_now(self._settings, topology)}
        moves, _ = moving.state(client)
        if moves is not None and moves.count:
            now |= {server.name: server for server in may_be_copied(self._settings)}
        demoted = now.keys() - self._configured
        for name in demoted - self._serving.keys():
            maillog.notice("info", "a backup since another answers: its worker starts", destination=name)
            self._serving[name] = workers_for(now[name])
        for name in demoted:
            self._looks.pop(name, None)
        return demoted

    def _judge(self, name: str, age: float | None, jobs: int) -> bool:
        """Say whether a worker must begin; one that is not needed any more ends."""
        is_needed = age is not None or jobs > 0
        if is_needed == (name in self._serving):
            self._looks.pop(name, None)
            return False
        self._looks[name] = self._looks.get(name, 0) + 1
        if is_needed and ((age or 0) > _OLD or self._looks[name] >= _LOOKS):
            return True
        if not is_needed and self._looks[name] >= _LOOKS:
            maillog.notice("info", "no copies are left: its worker ends", destination=name)
            del self._serving[name]
            del self._looks[name]
        return False

    def _begin(self, client: Redis, name: str, workers_for: Callable[[Destination], Sequence[Child]]) -> None:
        text: Any = client.hget(keys.DESTINATIONS, name)
        if text is None:
            return
        destination = _defined(text, name)
        if destination is None:
            if name not in self._undefined:
                self._undefined.add(name)
                words = "copies are left of a destination that nobody defines: add it as a backup, or queue move them"
                maillog.notice("warning", words, destination=name, pending=client.zcard(keys.PENDING + name))
            return
        maillog.notice(
            "warning",
            "no backup any more, but copies are left: a worker serves it until there are none",
            destination=name,
            pending=client.zcard(keys.PENDING + name),
        )
        primary = self._settings.primary
        if primary and _is_the_same(destination, primary):  # it had copies as a backup, and the settings know it well
            kept = {field: getattr(destination, field) for field in ("sender", "soft_bounce", "domains", "connections")}
            destination = replace(primary, **kept)
        else:
            destination = self._former.get(destination.to_json()) or _with_password(destination, self._named)
        self._serving[name] = workers_for(destination)
        self._looks.pop(name, None)


def _defined(text: str | bytes, name: str) -> Destination | None:
    try:
        destination = Destination.from_json(text)
    except ValueError:  # also one with continuity.NO_PORT, which is how one is listed that nobody has defined
        return None
    return destination if destination.name == name else None


def _is_the_same(one: Destination, other: Destination) -> bool:
    return all(getattr(one, field) == getattr(other, field) for field in ("name", "scheme", "host", "port", "username"))


def _with_password(destination: Destination, known: frozenset[str]) -> Destination:
    """Resolve the password of a destination from the ledger, which only has the reference, and keep its files.

    Both only where the settings have named just this destination with just these; see known_passwords.py.
    """
    if destination.to_json() not in known:
        if destination.password_from:
            text = "its password is not looked up: these settings have never named it; add it as a backup to deliver"
            maillog.notice("warning", text, destination=destination.name, password_from=destination.password_from)
        if files := known_passwords.files_of(destination):
            text = "its TLS files are not opened: these settings have never named them; add it as a backup to use them"
            maillog.notice("warning", text, destination=destination.name, files=" ".join(files))
            return replace(destination, ca_file="", tls_certificate="", tls_key="")
    elif destination.password_from:
        try:
            return replace(destination, password=resolve_password(destination.password_from, os.environ))
        except ValueError as error:
            maillog.notice("warning", "password_from", destination=destination.name, reason=str(error))
    return destination
