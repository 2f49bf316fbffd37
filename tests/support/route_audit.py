"""What the servers behind several hosts have had, id by id, beside what the sender was told.

Nothing that was accepted is missing anywhere, nothing comes twice without its line in a log, nothing more often than
it was sent, and no message of one id has two primaries for a recipient.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from support.mta_in_front import MtaInFront, Sent
from support.recorded_sessions import Transaction
from support.route_hosts import OWED, Hosts
from support.route_operators import Operator


class Audit:
    """What each server has had, beside what the sender was told."""

    def __init__(self, hosts: Hosts, sender: MtaInFront) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._log = hosts.log
        self._sender = sender
        events = [event for host in hosts.all for event in host.events]
        self._same: dict[str, str] = {}  # the id of a spare: that of its message
        for event in events:
            if event.get("event") in {"split copied", "split refused"}:
                self._same[event["copy"]] = event["id"]
            elif event.get("event") == "uncertain copied" and event.get("message"):
                self._same[event["id"]] = event["message"]
        self._may_repeat = {
            (self._same.get(event["id"], event["id"]), event.get("destination") or event.get("server"))
            for event in events
            if event.get("event") in {"may repeat", "uncertain copied", "split copied"}
        }
        self.primary_of: dict[tuple[int, str], list[str]] = defaultdict(list)
        self._look(hosts)

    def _look(self, hosts: Hosts) -> None:
        had: dict[tuple[int, str], dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        answered: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, found, number, made in self._messages(hosts):
            for recipient in found.recipients:
                if name not in OWED[recipient.partition("@")[2]]:
                    self.faults.append(f"{name} got mail of {recipient}: {made}")
                had[number, recipient][name][made] += 1
                if found.sender:
                    answered[made, recipient].append(name)
                    self.primary_of[number, recipient].append(name)
        for sent in self._sender.sent.values():
            for recipient in sent.recipients:
                self._check(sent, recipient, had[sent.number, recipient])
        for (made, recipient), names in answered.items():
            if len(names) > 1:
                self.faults.append(f"two primaries: {made} {recipient} {names}")
            if made not in self._log:
                self.faults.append(f"at a primary, and not in the log: {made} {recipient} {names}")

    def _messages(self, hosts: Hosts) -> Iterator[tuple[str, Transaction, int, str]]:
        """Yield each message that a server has, with its name, number and id; a spare has that of its message."""
        for name, server in hosts.servers.items():
            for found in server.messages:
                made = found.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode()
                yield name, found, int(found.header("Subject") or -1), self._same.get(made, made)

    def _check(self, sent: Sent, recipient: str, had: Mapping[str, Counter[str]]) -> None:
        self.counts["recipients"] += 1
        most = sent.at_most(recipient)
        if recipient in sent.accepted:
            self.counts["accepted"] += 1
            lost = [name for name in OWED[recipient.partition("@")[2]] if not had.get(name)]
            if lost:
                self.counts["lost"] += 1
                self.faults.append(f"lost at {lost}: {sent.number} {recipient} {sent.attempts} {dict(had)}")
        for name, ids in had.items():
            for made, count in ids.items():
                if count > 1:
                    self.counts["twice"] += 1
                    if (made, name) not in self._may_repeat:
                        self.counts["twice without a reason"] += 1
                        self.faults.append(f"twice at {name} without a reason: {sent.number} {recipient} {made}")
            if len(ids) > most:
                self.counts["more ids than tries"] += 1
                self.faults.append(f"more often than sent at {name}: {sent.number} {recipient} {ids} {sent.attempts}")
            if len(ids) > 1:
                self.counts["by several tries"] += 1


def acknowledged(operator: Operator, batch: set[str], audit: Audit, sender: MtaInFront) -> list[str]:
    """Return what began after a move was acknowledged, ended before the next, and went to the other primary."""
    wrong = []
    moves = [d for d in operator.done if d[2][0] == "move"]
    for (_, since, words, status), following in itertools.zip_longest(moves, moves[1:]):
        until = following[0] if following else float("inf")
        if status != 0:
            continue
        wanted = "new" if "--to" in words else "old"
        for sent in sender.sent.values():
            if len(sent.attempts) != 1 or not since < sent.attempts[0].begun < sent.attempts[0].ended < until:
                continue
            for recipient in batch & set(sent.accepted):
                audit.counts["after an acknowledged move"] += 1
                found = audit.primary_of[sent.number, recipient]
                if found not in ([], [wanted]):  # []: its server failed in a message that forked, and got a copy
                    wrong.append(f"{recipient} went to {found}, not {wanted}: {sent.attempts} {words} {since} {until}")
    return wrong
