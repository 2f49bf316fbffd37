"""The audit of a soak: what was accepted against what the primary and each backup have noted, and against the log.

Lost is a recipient for whom a client got a 2xx and whose message is not at the primary, or not at a backup. A copy
that came twice under one id needs a line ``may repeat`` with that id and backup; a copy of what the primary does not
have under that id needs one that says ``uncertain``. Anything else that is not as it should be is a fault.
"""

from __future__ import annotations

import bisect
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from bench.disturbances import Disturbance

_EXPLAIN = ("may repeat", "uncertain", "uncertain copied")
_FAULTS = ("copy lost", "body missing", "session error", "task failed", "outcomes lost", "unreadable message")
_WORKER = re.compile(r"^worker \S+\.(\d+)\.\d+ ")  # it died, or is gone
_SHOWN = 20


@dataclass(slots=True)
class Arrivals:
    """What one server has taken: recipients (a bit each) by number and by id, and what came again."""

    by_number: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    by_id: dict[bytes, int] = field(default_factory=dict)
    numbers: dict[bytes, int] = field(default_factory=dict)
    again: list[tuple[float, bytes]] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Arrivals:
        """Read a recording server's file."""
        self = cls()
        with path.open("rb") as lines:
            for line in lines:
                words = line.split()
                if words[0] == b"corrupt":
                    self.corrupt.append(line.decode().strip())
                    words = words[1:]
                number, mask, name = int(words[1]), int(words[2]), words[3]
                self.by_number[number] |= mask
                before = self.by_id.get(name, 0)
                if before & mask:
                    self.again.append((int(words[0]) / 1000, name))
                self.by_id[name] = before | mask
                self.numbers[name] = number
        return self


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

    def explains(self, name: bytes, kinds: Iterable[str], destination: str) -> Reason | None:
        """Return the log's first reason for this id at this destination, None when it gave none."""
        for reason in self.reasons.get(name.decode(), ()):
            if reason.kind in kinds and reason.destination in {"", destination}:
                return reason
        return None


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


def examine(accepted: Path, primary: Path, backups: dict[str, Path], log: Path, done: Sequence[Disturbance]) -> Verdict:
    """Compare everything. ``backups`` are named by their addresses, as the product names them."""
    verdict = Verdict()
    said = Log.read(log)
    verdict.trouble = said.trouble
    verdict.faults += [f"{count} times in the log: {kind}" for kind, count in said.faults.items()]
    taken, refused = _accepted(accepted)
    verdict.accepted = len({number for number, _, _ in taken})
    verdict.fault("5xx for mail that nobody refused", refused)
    first = Arrivals.read(primary)
    verdict.figures["resent, twice at the primary"] = len(first.by_id) - len(first.by_number)
    _lost(verdict, "the primary", taken, first)
    for address, path in backups.items():
        arrivals = Arrivals.read(path)
        _lost(verdict, address, taken, arrivals)
        _duplicates(verdict, address, arrivals, first, said, done)
    return verdict


def _accepted(path: Path) -> tuple[list[tuple[int, int, bytes]], list[str]]:
    taken, refused = [], []
    with path.open("rb") as lines:
        for line in lines:
            if line.startswith(b"refused"):
                refused.append(line.decode("utf-8", "replace").strip())
            else:
                number, mask, name = line.split()
                taken.append((int(number), int(mask), name))
    return taken, refused


def _lost(verdict: Verdict, where: str, taken: Sequence[tuple[int, int, bytes]], arrivals: Arrivals) -> None:
    # A number of which another try has arrived is no loss to its reader, but its id was promised.
    verdict.fault(
        f"lost at {where}", [f"{n} ({name.decode()})" for n, mask, name in taken if mask & ~arrivals.by_number[n]]
    )
    verdict.fault(
        f"ids lost at {where}",
        [
            f"{n} ({name.decode()})"
            for n, mask, name in taken
            if mask & ~arrivals.by_id.get(name, 0) and not mask & ~arrivals.by_number[n]
        ],
    )
    verdict.fault(f"corrupt at {where}", arrivals.corrupt)


def _duplicates(
    verdict: Verdict, address: str, arrivals: Arrivals, first: Arrivals, said: Log, done: Sequence[Disturbance]
) -> None:
    unexplained = []
    for at, name in arrivals.again:
        reason = said.explains(name, ("may repeat",), address)
        if reason is None:
            unexplained.append(f"{arrivals.numbers[name]} ({name.decode()}) at {at:.3f}")
        else:
            verdict.causes[_cause(done, reason)] += 1
    verdict.fault(f"copies came again at {address} without a reason in the log", unexplained)
    strangers = [name for name in arrivals.by_id if name not in first.by_id]
    unexplained = []
    for name in strangers:
        reason = said.explains(name, ("uncertain", "uncertain copied"), address)
        if reason is None:
            unexplained.append(f"{arrivals.numbers[name]} ({name.decode()})")
        else:
            verdict.causes[_cause(done, reason)] += 1
    verdict.fault(f"copies at {address} of what the primary never took, without a reason in the log", unexplained)
    verdict.fault(
        f"copies at {address} for recipients whom the primary refused",
        [n.decode() for n, mask in arrivals.by_id.items() if n in first.by_id and mask & ~first.by_id[n]],
    )
    verdict.figures[f"came twice at {address}"] = len(arrivals.again)
    verdict.figures[f"uncertain, copied to {address} only"] = len(strangers)


def _cause(done: Sequence[Disturbance], reason: Reason) -> str:
    """Return what was done to bring that about: the end of the worker that it names, else the last thing before it."""
    index = bisect.bisect_right([d.at for d in done], reason.at)
    if found := _WORKER.search(reason.text):
        pid = int(found[1])
        what = next((d.what for d in reversed(done[:index]) if pid in d.ended), "a worker that nobody killed")
    else:
        what = done[index - 1].what if index else "nothing"
    return what.partition(" for ")[0].partition(", started")[0]
