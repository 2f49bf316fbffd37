"""The audit of a soak: what was accepted against what each server has noted, the failed list, and the log.

An id has one primary, the one of the time at which it was made; every other server is a backup to it. For each id that
a client was promised, each server must have each recipient, or have refused it for good and the failed list have it.
What arrived must be the message, octet by octet, with the sender, the parameters and the recipients that its number
makes (bench/numbered.py). Each further arrival of an id at a backup needs a line ``may repeat`` of its own, with that
id and backup; a copy of what the primary does not have under that id one that says ``uncertain``. The product itself
never sends an id to the primary twice; a number is there once more only when its client heard no 2xx and sent again.
What was accepted when all had been well for a while needs no such line, and no repair. Anything else is a fault.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import NamedTuple

from bench import numbered
from bench.disturbances import Disturbance
from relay.mail.ids import made_at

_EXPLAIN = ("may repeat", "uncertain", "uncertain copied", "requeued")
_FAULTS = ("copy lost", "body missing", "session error", "task failed", "outcomes lost", "unreadable message")
_WORKER = re.compile(r"^worker \S+\.(\d+)\.\d+ ")  # it died, or is gone
_SHOWN = 20
_MOST = 255  # arrivals of one recipient that are counted: an octet for each


@dataclass(slots=True)
class Arrivals:
    """What one server has taken: recipients (a bit each) by number and by id, how often, and what is not as sent."""

    by_number: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    by_id: dict[bytes, int] = field(default_factory=dict)
    counts: dict[bytes, int] = field(default_factory=dict)  # by id, an octet for each recipient
    numbers: dict[bytes, int] = field(default_factory=dict)
    again: list[tuple[float, bytes]] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    altered: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, kind: str = "") -> Arrivals:
        """Read a recording server's file; with a kind of mail each message is compared with what was sent."""
        self = cls()
        with path.open("rb") as lines:
            for line in lines:
                words = line.split()
                if words[0] == b"corrupt":
                    self.corrupt.append(line.decode("utf-8", "replace").strip())
                    words = words[1:]
                number, mask, name = int(words[1]), int(words[2]), words[3]
                if kind and number >= 0:
                    self._compare(number, mask, name, words[4:], kind)
                self.by_number[number] |= mask
                before = self.by_id.get(name, 0)
                if before & mask:
                    self.again.append((int(words[0]) / 1000, name))
                self.by_id[name] = before | mask
                self.counts[name] = _added(self.counts.get(name, 0), mask)
                self.numbers[name] = number
        return self

    def times(self, name: bytes) -> int:
        """Return how often an id came to the recipient to whom it came most often."""
        return max(_octets(self.counts.get(name, 0)))

    def _compare(self, number: int, mask: int, name: bytes, told: list[bytes], kind: str) -> None:
        digest, addresses = _expected(number, kind)
        wanted = [address for i, address in enumerate(addresses) if mask >> i & 1]
        found = sorted(told[1].split(b",")) if len(told) > 1 else []
        if sorted(wanted) != found:
            self.altered.append(f"{number} ({name.decode()}) came for {b','.join(found).decode('utf-8', 'replace')}")
        elif told[0].decode() != digest:
            self.altered.append(f"{number} ({name.decode()}) has another sender, parameters or octets")
        elif self.numbers.get(name, number) != number:
            self.altered.append(f"{number} came under the id of {self.numbers[name]} ({name.decode()})")


@lru_cache(maxsize=50_000)
def _expected(number: int, kind: str) -> tuple[str, tuple[bytes, ...]]:
    made = numbered.compose(number, kind)
    return made.digest, made.recipients


def _added(counts: int, mask: int) -> int:
    """Count one arrival more for each recipient of a mask."""
    index = 0
    while mask:
        if mask & 1 and counts >> 8 * index & _MOST < _MOST:
            counts += 1 << 8 * index
        mask >>= 1
        index += 1
    return counts


def _octets(counts: int) -> bytes:
    return counts.to_bytes(counts.bit_length() // 8 + 1, "little")


class Reason(NamedTuple):
    """A line of the log that says why a copy may come twice."""

    at: float
    kind: str
    destination: str
    text: str


@dataclass(slots=True)
class Log:
    """What the product's log says about copies that may come twice, and about trouble."""

    reasons: dict[str, list[Reason]] = field(default_factory=lambda: defaultdict(list))
    trouble: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read the log; what is no JSON object is left out."""
        self = cls()
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"level": "info"' in line or '"level": "debug"' in line:
                    continue
                try:
                    event = json.loads(line)
                except ValueError:
                    if not line.startswith((" ", "{")):
                        self.trouble[f"(no JSON) {line.strip()[:60]}"] += 1
                    continue
                kind = event["event"]
                if kind in _EXPLAIN:
                    at = datetime.fromisoformat(event["time"]).timestamp()
                    reason = Reason(at, kind, event.get("destination", ""), event.get("reason", ""))
                    self.reasons[event["id"]].append(reason)
                elif kind in _FAULTS:
                    self.faults[kind] += 1
                self.trouble[kind if len(kind) < 40 else kind[:40] + "..."] += 1
        return self

    def explain(self, name: bytes, kinds: Sequence[str], destination: str) -> list[Reason]:
        """Return the log's reasons of these kinds for this id at this destination."""
        found = self.reasons.get(name.decode(), ())
        return [r for r in found if r.kind in kinds and r.destination in {"", destination}]


@dataclass(slots=True)
class Promises:
    """What the source of mail has noted."""

    taken: list[tuple[int, int, bytes]] = field(default_factory=list)
    unanswered: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # an octet for each recipient
    refused: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Promises:
        self = cls()
        with path.open("rb") as lines:
            for line in lines:
                words = line.split()
                if words[0] == b"refused":
                    self.refused.append(line.decode("utf-8", "replace").strip())
                elif words[0] == b"unanswered":
                    number = int(words[1])
                    self.unanswered[number] = _added(self.unanswered[number], int(words[2]))
                else:
                    self.taken.append((int(words[0]), int(words[1]), words[2]))
        return self


@dataclass(slots=True)
class Verdict:
    """The result. ``causes`` counts explained duplicates by the disturbance before their line in the log."""

    accepted: int = 0
    faults: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    causes: Counter[str] = field(default_factory=Counter)
    trouble: Counter[str] = field(default_factory=Counter)

    def fault(self, text: str, found: Sequence[object]) -> None:
        """Note something wrong, with some of the cases."""
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            self.faults.append(f"{len(found)} {text}: {', '.join(map(str, found[:_SHOWN]))}{more}")


@dataclass(frozen=True, slots=True)
class Records:
    """All that an audit reads. Servers are named by their addresses, as the product names them."""

    accepted: Path  # of the source
    servers: Mapping[str, Path]
    primaries: Sequence[tuple[float, str]]  # from when on which server is the primary, in order
    log: Path
    refusing: frozenset[str] = frozenset()  # the servers that refuse some for good
    failed: Sequence[Mapping[str, object]] = ()  # rows of `failed list --json`
    done: Sequence[Disturbance] = ()
    calm: float = inf  # from then on nothing was disturbed, nor was shortly before
    kind: str = "varied"

    def primary(self, name: bytes) -> str:
        """Return the primary of an id."""
        at = made_at(name.decode())
        return next((server for since, server in reversed(self.primaries) if since <= at), self.primaries[0][1])


def examine(records: Records) -> Verdict:
    """Compare everything."""
    return _Audit(records).verdict


class _Audit:
    def __init__(self, records: Records) -> None:
        self._records = records
        self._said = Log.read(records.log)
        self._promises = Promises.read(records.accepted)
        self._at = {address: Arrivals.read(path, records.kind) for address, path in records.servers.items()}
        self._failed = self._read_failed()
        self.verdict = Verdict(accepted=len({number for number, _, _ in self._promises.taken}))
        self.verdict.trouble = self._said.trouble
        self.verdict.faults += [f"{count} times in the log: {kind}" for kind, count in self._said.faults.items()]
        self.verdict.fault("5xx for mail that nobody refused", self._promises.refused)
        self._primary_of = {name: records.primary(name) for at in self._at.values() for name in at.by_id}
        self._primary_of |= {name: records.primary(name) for _, _, name in self._promises.taken}
        for address, arrivals in self._at.items():
            self.verdict.fault(f"corrupt at {address}", arrivals.corrupt)
            self.verdict.fault(f"other than what was sent at {address}", arrivals.altered)
            self._lost(address, arrivals)
            self._duplicates(address, arrivals)
            self._refused(address, arrivals)
        self._exchanged()
        self._twice_at_the_primary()
        self._calm()

    def _read_failed(self) -> dict[tuple[str, bytes], tuple[str, ...]]:
        """Return the recipients on the failed list by destination and id."""
        found: dict[tuple[str, bytes], tuple[str, ...]] = {}
        for row in self._records.failed:
            recipients = row["recipients"]
            assert isinstance(recipients, list)
            found[str(row["destination"]), str(row["id"]).encode()] = tuple(sorted(map(str, recipients)))
        return found

    def _owed(self, address: str, number: int, mask: int, name: bytes) -> int:
        """Return the recipients that must have arrived: at a backup that refuses some, the others."""
        if address not in self._records.refusing or self._primary_of[name] == address:
            return mask
        return sum(1 << i for i in range(mask.bit_length()) if mask >> i & 1 and not numbered.is_refused(number, i))

    def _lost(self, address: str, arrivals: Arrivals) -> None:
        # A number of which another try has arrived is no loss to its reader, but its id was promised.
        lost, ids = [], []
        for number, mask, name in self._promises.taken:
            owed = self._owed(address, number, mask, name)
            if owed & ~arrivals.by_number.get(number, 0):
                lost.append(f"{number} ({name.decode()})")
            elif owed & ~arrivals.by_id.get(name, 0):
                ids.append(f"{number} ({name.decode()})")
        self.verdict.fault(f"lost at {address}", lost)
        self.verdict.fault(f"ids lost at {address}", ids)

    def _exchanged(self) -> None:
        """See that an id is of one number, wherever it came to."""
        numbers = {name: number for number, _, name in self._promises.taken}
        wrong = []
        for address, arrivals in self._at.items():
            for name, number in arrivals.numbers.items():
                if numbers.setdefault(name, number) != number:
                    wrong.append(f"{name.decode()} is of {numbers[name]}, at {address} of {number}")
        self.verdict.fault("ids of one message on another", wrong)

    def _duplicates(self, address: str, arrivals: Arrivals) -> None:
        copies = [name for name in arrivals.by_id if self._primary_of[name] != address]
        again, unexplained = 0, []
        for name in copies:
            more = arrivals.times(name) - 1
            again += more
            reasons = self._said.explain(name, ("may repeat",), address)
            self.verdict.causes.update(_cause(self._records.done, reason) for reason in reasons[:more])
            if more > len(reasons):
                unexplained.append(
                    f"{arrivals.numbers[name]} ({name.decode()}) {more} times again, {len(reasons)} reasons"
                )
        self.verdict.fault(f"copies came again at {address} without a reason in the log for each time", unexplained)
        strangers, unexplained, others = 0, [], []
        for name in copies:
            first = self._at[self._primary_of[name]]
            if name in first.by_id:
                if arrivals.by_id[name] & ~first.by_id[name]:
                    others.append(name.decode())
                continue
            strangers += 1
            reasons = self._said.explain(name, ("uncertain", "uncertain copied"), address)
            self.verdict.causes.update(_cause(self._records.done, reason) for reason in reasons[:1])
            if not reasons:
                unexplained.append(f"{arrivals.numbers[name]} ({name.decode()})")
        self.verdict.fault(
            f"copies at {address} of what its primary never took, without a reason in the log", unexplained
        )
        self.verdict.fault(f"copies at {address} for recipients whom the primary refused", others)
        self.verdict.figures[f"came twice at {address}"] = again
        self.verdict.figures[f"uncertain, copied to {address} only"] = strangers

    def _refused(self, address: str, arrivals: Arrivals) -> None:
        """See that the failed list has whom the server refuses for good, just them, and that they got nothing."""
        refuses = address in self._records.refusing
        delivered = [
            f"{arrivals.numbers[name]} ({name.decode()})"
            for name, mask in arrivals.by_id.items()
            if refuses and mask & ~self._owed(address, arrivals.numbers[name], mask, name)
        ]
        self.verdict.fault(f"taken by {address}, which refuses them", delivered)
        listed = {name: recipients for (where, name), recipients in self._failed.items() if where == address}
        wrong, missing = [], []
        for number, mask, name in self._promises.taken:
            never = mask & ~self._owed(address, number, mask, name)
            addresses = _expected(number, self._records.kind)[1]
            wanted = tuple(sorted(a.decode() for i, a in enumerate(addresses) if never >> i & 1))
            found = listed.pop(name, ())
            if wanted and not found:
                missing.append(f"{number} ({name.decode()})")
            elif wanted != found:
                wrong.append(f"{number} ({name.decode()}): {', '.join(found)} and not {', '.join(wanted) or 'nobody'}")
        for (
            name,
            found,
        ) in listed.items():  # of a message that its client sent again: who is refused is known all the same
            known = [re.fullmatch(r"n(\d+)\.(\d+)@.*", recipient) for recipient in found]
            is_known = refuses and all(match and numbered.is_refused(int(match[1]), int(match[2])) for match in known)
            is_at_primary = (
                name in self._at[self._records.primary(name)].by_id
            )  # and nobody was left to tell its client
            if not (
                is_known and (is_at_primary or self._said.explain(name, ("uncertain", "uncertain copied"), address))
            ):
                wrong.append(f"({name.decode()}): {', '.join(found)}")
        self.verdict.fault(f"refused by {address} and not on the failed list", missing)
        self.verdict.fault(f"on the failed list for {address} with other recipients than it refuses", wrong)
        if refuses:
            self.verdict.figures[f"on the failed list for {address}"] = sum(w == address for w, _ in self._failed)

    def _twice_at_the_primary(self) -> None:
        """See that no id came to its primary twice, and no number more often than its client has sent it."""
        ids, count = [], Counter[tuple[int, int]]()
        for address, arrivals in self._at.items():
            for name, mask in arrivals.by_id.items():
                if self._primary_of[name] == address:
                    if arrivals.times(name) > 1:
                        ids.append(f"{arrivals.numbers[name]} ({name.decode()})")
                    count.update((arrivals.numbers[name], i) for i in range(mask.bit_length()) if mask >> i & 1)
        self.verdict.fault("ids came to their primary twice", ids)
        allowed = Counter(
            (n, i) for n, mask, _ in self._promises.taken for i in range(mask.bit_length()) if mask >> i & 1
        )
        for number, counts in self._promises.unanswered.items():
            for i, times in enumerate(_octets(counts)):
                allowed[number, i] += times
        more = [f"{n}.{i}: {times} times" for (n, i), times in count.items() if times > allowed[n, i]]
        self.verdict.fault("numbers are at the primary more often than their client sent them", more)
        self.verdict.figures["sent again by the client, twice at the primary"] = sum(t > 1 for t in count.values())

    def _calm(self) -> None:
        """See that mail which was accepted when all was well went its way without a net."""
        calm = [name for _, _, name in self._promises.taken if made_at(name.decode()) >= self._records.calm]
        self.verdict.figures["accepted in the calm at the end"] = len(calm)
        caught = [f"{name.decode()}: {self._said.reasons[name.decode()][0].kind}" for name in calm
                  if name.decode() in self._said.reasons]  # fmt: skip
        self.verdict.fault("messages needed repair though all was well", caught)


def _cause(done: Sequence[Disturbance], reason: Reason) -> str:
    """Return what was done to bring that about: the end of the worker that it names, else the last thing before it."""
    index = bisect.bisect_right([d.at for d in done], reason.at)
    if found := _WORKER.search(reason.text):
        pid = int(found[1])
        what = next((d.what for d in reversed(done[:index]) if pid in d.ended), "a worker that nobody killed")
    else:
        what = done[index - 1].what if index else "nothing"
    return what.partition(" for ")[0].partition(", started")[0]
