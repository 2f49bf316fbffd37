"""``python -m bench.outage``: an hour's mail queues up for a dead backup within minutes, then the backup comes back.

Measured: the memory that a pending copy takes in the embedded Redis (goals: the body and 600 octets when it does not
compress, 0.7 of the body for ordinary text), the rate of the drain (goal: half of the rate at which mail is accepted
and delivered when all is well), and how far the order of ages is kept. The exit status is 1 when a copy is missing or
came twice, never because something is slow.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

if __package__ in {None, ""}:  # run by its path: only the folder above may be searched, some names here are common
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import redis

from bench import ROOT, programs
from bench.audit import Arrivals
from bench.numbered import message
from bench.results import Goal
from relay.ledger import keys
from support.child_processes import tied
from support.product import Product
from support.waiting import free_port, wait_until

_AS_SHIPPED = {"smtp.processes": "0", "log.level": "warning", "log.format": "text", "spool.min_free": "1G"}
_EXTRA = 600  # octets for a copy that does not compress
_SHARE = 0.7  # of the body, for ordinary text
_NEAR = 0.05  # of all copies: so far from its place a copy may arrive


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured."""

    normal: float  # messages a second, accepted and delivered
    queued: float  # accepted a second while the backup is away
    drained: float  # copies a second
    octets: float  # of memory for a pending copy
    body: float  # octets of a message as the client sent it
    near: float  # the share of copies that arrived near their place
    furthest: float  # how far the worst was from its place, as a share of all

    def goals(self, kind: str) -> list[Goal]:
        limit = self.body + _EXTRA if kind == "noise" else _SHARE * self.body
        return [
            Goal("memory for a pending copy", self.octets, limit, at_least=False, unit="octets"),
            Goal("drained", self.drained, self.normal / 2, unit="copies/s"),
            Goal("arrived near their place in the order of ages", 100 * self.near, 95, unit="%"),
        ]


class Outage:
    """One run: the product, its servers, and how many messages there were so far."""

    def __init__(self, folder: Path, stack: ExitStack, *, kind: str, size: int, sessions: int) -> None:
        self._folder = folder
        self._words = ["--kind", kind, "--size", str(size)]
        self._sessions = sessions
        self._sent = 0
        ports = [free_port(), free_port()]
        self._servers = [
            programs.start(stack, "recording_server", str(port), str(folder / name), "1", port=port, told=True)
            for name, port in zip(("primary", "backup"), ports, strict=True)
        ]
        primary, self._backup = (f"127.0.0.1:{port}" for port in ports)
        self._product = Product(folder, primary=primary, backups=[self._backup], settings=_AS_SHIPPED)
        stack.callback(self._product.clean_up)
        self._product.start()
        self._client = redis.Redis.from_url(self._product.redis_url)
        stack.callback(self._client.close)

    def run(self, usual: int, count: int, body: float) -> Figures:
        """Have so many messages sent when all is well, and so many while the backup is away."""
        begun = time.monotonic()
        self._send(usual)
        self._wait_for_pending(0)
        normal = usual / (time.monotonic() - begun)
        self._tell("down")
        before = self._memory()
        queued = count / self._send(count)
        self._wait_for_pending(count)
        octets = (self._memory() - before) / count
        self._tell("well")
        begun = time.monotonic()
        self._product.json("queue", "flush")
        self._wait_for_pending(0)
        drained = count / (time.monotonic() - begun)
        near, furthest = self._order(usual)
        return Figures(normal, queued, drained, octets, body, near, furthest)

    def faults(self) -> list[str]:
        """Return what is missing or came twice."""
        found = []
        for name in ("primary", "backup"):
            arrivals = Arrivals.read(self._folder / name)
            if missing := self._sent - len(arrivals.by_number):
                found.append(f"{missing} missing at the {name}")
            if arrivals.again:
                found.append(f"{len(arrivals.again)} came twice at the {name}")
            if arrivals.corrupt:
                found.append(f"{len(arrivals.corrupt)} corrupt at the {name}")
        return found

    def _send(self, count: int) -> float:
        """Send so many messages; return the seconds until the last was accepted."""
        words = [str(self._product.smtp_port), str(self._folder / "accepted"), str(self._sessions), "1", *self._words]
        command = [sys.executable, "-m", "bench.numbered_source", *words]
        begun = time.monotonic()
        with subprocess.Popen(
            tied([*command, "--first", str(self._sent), "--count", str(count)]), cwd=ROOT, stdin=subprocess.PIPE
        ) as process:
            try:
                if process.wait():
                    raise RuntimeError("not all mail was accepted")
            finally:
                process.kill()
        self._sent += count
        return time.monotonic() - begun

    def _tell(self, mood: str) -> None:
        pipe = self._servers[1].stdin
        assert pipe is not None
        pipe.write(mood.encode() + b"\n")
        pipe.flush()

    def _wait_for_pending(self, count: int) -> None:
        key = keys.PENDING + self._backup
        wait_until(lambda: self._client.zcard(key) == count, 1800, lambda: f"{self._client.zcard(key)} pending", 0.05)

    def _memory(self) -> int:
        """Return the memory that data takes, when all that is on its way has come to rest."""
        seen: list[int] = []
        while len(seen) < 3 or max(seen[-3:]) - min(seen[-3:]) > 100_000:
            state = self._client.info()
            if not state["aof_rewrite_in_progress"]:
                seen.append(state["used_memory"] - state["mem_clients_normal"])
            time.sleep(0.5)
        return min(seen[-3:])

    def _order(self, usual: int) -> tuple[float, float]:
        """Compare the order of arrival with the order of the ids, which is that of age."""
        with (self._folder / "backup").open("rb") as lines:
            ids = [words[3] for line in lines if int((words := line.split())[1]) >= usual]
        place = {name: at for at, name in enumerate(sorted(ids))}
        away = [abs(place[name] - at) / len(ids) for at, name in enumerate(ids)]
        return sum(distance <= _NEAR for distance in away) / len(away), max(away)


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--usual", type=int, default=10_000, help="messages sent before, when all is well")
    parser.add_argument("--kind", choices=("text", "mail", "noise"), default="text")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--sessions", type=int, default=20)
    given = parser.parse_args()
    body = sum(len(message(n, given.kind, given.size)[0]) for n in range(500)) / 500
    folder = tempfile.TemporaryDirectory(prefix="smtp-dup-outage-", ignore_cleanup_errors=True)
    with folder, ExitStack() as stack:
        outage = Outage(Path(folder.name), stack, kind=given.kind, size=given.size, sessions=given.sessions)
        figures = outage.run(given.usual, given.messages, body)
        faults = outage.faults()
    print(f"{given.messages} messages of {body:.0f} octets ({given.kind}) for a dead backup")
    rows = [
        (figures.normal, "messages a second accepted and delivered when all is well"),
        (figures.queued, "messages a second accepted while it is away"),
        (figures.drained, "copies a second once it is back"),
        (figures.octets, f"octets of memory for a pending copy, {figures.octets / body:.2f} of the body"),
        (100 * figures.near, f"% within {_NEAR:.0%} of their place by age, the worst {figures.furthest:.1%} away"),
    ]
    for figure, text in rows:
        print(f"{figure:10.1f} {text}")
    for goal in figures.goals(given.kind):
        limit = f"{'at least' if goal.at_least else 'at most'} {goal.limit:.0f} {goal.unit}"
        print(f"goal {'met' if goal.met else 'MISSED'}: {goal.text}, {limit}: {goal.measured:.0f}")
    for fault in faults:
        print(f"FAULT: {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
