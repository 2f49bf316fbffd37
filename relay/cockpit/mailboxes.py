"""Is one mailbox ready to move, and is all well with those that have: by few criteria, each for these mailboxes alone.

What is known of their copies is looked up in the ledger and in the trace; what nobody can tell is a warning, since a
mailbox goes back in a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis

from relay.cockpit import formatting, moves, probed_moves, tracing
from relay.cockpit.finding import Finding, fails, passes, unknown, warns
from relay.config.model import Settings
from relay.topology import decisions, moving
from relay.topology.decisions import View
from relay.topology.moved import MovedEntry
from relay.trace.events import ACCEPTED
from relay.trace.life import DELIVERED
from relay.trace.lookup import Query, Unseen

_LOOKED_AT = 20  # messages of the trace


@dataclass(frozen=True, slots=True)
class MailboxJudged:
    """One criterion of a mailbox, or of all that have moved to a server."""

    criterion: str
    finding: Finding


@dataclass(frozen=True, slots=True)
class MailboxVerdict:
    """The verdict on an address, or on all that have moved to ``server``; ``former`` answers else."""

    subject: str
    server: str
    former: str
    has_moved: bool
    judged: Sequence[MailboxJudged]

    @property
    def is_ready(self) -> bool:
        return not any(one.finding.result.blocks for one in self.judged)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        bad = [one.criterion for one in self.judged if one.finding.result.blocks]
        if self.has_moved:
            return f"moved to {self.server}, {'all is well' if not bad else 'NOT WELL: ' + ', '.join(bad)}"
        return f"{'READY' if not bad else 'NOT READY'} for {self.server}{': ' + ', '.join(bad) if bad else ''}"

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "subject": self.subject,
            "server": self.server,
            "former": self.former,
            "moved": self.has_moved,
            "ready": self.is_ready,
            "summary": self.summary,
            "criteria": [
                {"criterion": one.criterion, "result": one.finding.result.value, "text": one.finding.text}
                for one in self.judged
            ],
        }


def of_address(
    connection: Redis, settings: Settings, asked: moves.Wish, *, check: bool = False
) -> list[MailboxVerdict]:
    """Return the verdict on an address, for where it has moved to, else for each server that it can move to.

    With ``check`` that server is asked whether it has the mailbox.

    Raises BadTable, OSError, RedisError.
    """
    seen = decisions.view(connection)
    answering = moves.Answering(connection, settings)
    keys = answering.keys(asked.key)
    found, _ = moving.entries(connection, keys)
    entry = next((found[key] for key in keys if key in found), None)
    former = answering.former(asked.key)
    names = [entry.server] if entry else [n for n in former.copied(answering.backups) if n not in former.servers[:1]]
    verdicts = []
    for name in names:
        judged = [MailboxJudged("moved", _moved(entry, former.servers[0]))]
        judged.append(MailboxJudged("server", _server(connection, settings, seen, name)))
        if check and (server := next((s for s in settings.named if s.name == name), None)):
            (said,) = probed_moves.probe(settings, server, [asked.key])
            judged.append(MailboxJudged("mailbox", probed_moves.judged(said, name)))
        if not answering.is_copied(asked.key, name):
            judged.append(MailboxJudged("copies", fails(f"{name} gets no copies of its mail")))
        judged.append(MailboxJudged("divergence and waiting", _troubles(connection, settings, name, [asked.key])))
        last = _last(connection, settings, asked.key, name, has_moved=entry is not None)
        judged.append(MailboxJudged("last delivered", last))
        if entry and former.servers[0] != name:
            judged.append(MailboxJudged("way back", _troubles(connection, settings, former.servers[0], [asked.key])))
        verdicts.append(MailboxVerdict(asked.key, name, former.servers[0], entry is not None, judged))
    return verdicts


def of_moved(connection: Redis, settings: Settings) -> list[MailboxVerdict]:
    """Return the verdict on those that have moved, for each server that some have moved to.

    Raises BadTable, OSError, RedisError.
    """
    seen = decisions.view(connection)
    answering = moves.Answering(connection, settings)
    of_server: dict[str, list[str]] = {}
    for key, entry in moving.everything(connection):
        of_server.setdefault(entry.server, []).append(key)
    verdicts = []
    for name, keys in sorted(of_server.items()):
        formers: dict[str, list[str]] = {}
        for key in keys:
            if (former := answering.former(key).servers[0]) != name:
                formers.setdefault(former, []).append(key)
        judged = [
            MailboxJudged("map", _map(connection, settings, seen)),
            MailboxJudged("server", _server(connection, settings, seen, name)),
            MailboxJudged("from before", _troubles(connection, settings, name, keys)),
            *(
                MailboxJudged(f"way back to {former}", _troubles(connection, settings, former, theirs))
                for former, theirs in sorted(formers.items())
            ),
        ]
        subject = formatting.count(len(keys), "address", "addresses")
        verdicts.append(MailboxVerdict(subject, name, ", ".join(sorted(formers)) or name, True, judged))
    return verdicts


def _moved(entry: MovedEntry | None, former: str) -> Finding:
    if entry is None:
        return passes(f"no: {former} answers")
    note = f": {entry.note}" if entry.note else ""
    return passes(f"yes, to {entry.server} at {formatting.moment(entry.at)} by {entry.by or 'somebody'}{note}")


def _map(connection: Redis, settings: Settings, seen: View) -> Finding:
    """Everybody goes by the map, and Redis has it."""
    lost = moves.begin(connection, settings).lost
    late = [beat for beat in seen.living if not seen.goes_by_moves(beat)]
    texts = [lost] if lost else []
    texts += [f"{beat.label}: {beat.moved_trouble or 'has not followed'}" for beat in late]
    if texts:
        return fails("; ".join(texts))
    if not seen.living:
        return unknown("no relay process is heard of")
    generation = seen.moves.generation if seen.moves else 0
    return passes(f"{formatting.count(len(seen.living), 'relay process', 'relay processes')}, generation {generation}")


def _server(connection: Redis, settings: Settings, seen: View, name: str) -> Finding:
    texts = list(moves.objections(connection, settings, name, seen.living))
    return fails("; ".join(texts)) if texts else passes(f"{name} can be used, from every host")


def _troubles(connection: Redis, settings: Settings, name: str, keys: Sequence[str]) -> Finding:
    try:
        found = moves.troubles(connection, settings, name, keys)
    except moves.TooMany:
        return unknown(f"too many copies wait for {name} or have failed to look whose they are")
    if not found:
        return passes(f"no copy has failed at {name} or waits for long")
    texts = [f"{key}: {'; '.join(why)}" if len(keys) > 1 else "; ".join(why) for key, why in sorted(found.items())]
    return fails(formatting.some(texts))


def _last(connection: Redis, settings: Settings, key: str, name: str, *, has_moved: bool) -> Finding:
    """Return when the last copy for it was delivered, or the last message where it answers."""
    try:
        query = Query.of([f"to:{key}"], limit=_LOOKED_AT)
    except ValueError:
        return warns("the trace cannot be asked for it")
    for life in tracing.search(settings, connection, query, Unseen(), None):
        for copy in life.copies:
            if copy.destination == name and copy.status == DELIVERED:
                return passes(f"a copy at {name} {formatting.moment(copy.at)} (id {life.id})")
        received = life.received
        if has_moved and received and received.primary == name and received.outcome == ACCEPTED:
            return passes(f"{name} has answered for its mail {formatting.moment(life.at)} (id {life.id})")
    return warns(f"the trace knows of none at {name}")
