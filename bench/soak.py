"""``python -m bench.soak --minutes N --seed S``: numbered mail at full speed while everything is killed and stalled.

The real product with its embedded Redis and two backups, of which the second refuses some recipients and messages for
good; the primary and the backups go down, stall, and break off too. Half way the primary and the first backup exchange
their roles. In the end all is let run: some mail goes through in the calm, then what is owed drains by itself, with the
reconciler as the only net, and is audited (bench/audit.py). The exit status is 1 on any fault; the folder with every
record and the whole log (some 100 MB a minute) is kept then, else deleted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType

if __package__ in {None, ""}:  # run by its path: only the folder above may be searched, some names here are common
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import redis

from bench import audit, programs
from bench.disturbances import Disturbance, Disturber, Server
from relay.ledger import keys, overview
from relay.spool import writer
from support.product import Product
from support.waiting import free_port

SETTINGS = {
    "smtp.processes": "2",
    "retry.first": "1",
    "retry.longest": "4",
    "retry.give_up": "1h",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "relay.final_timeout_seconds": "8",
    "relay.uncertain_hold": "3",
    "redis.timeout_seconds": "2",
    "workers.sweep": "5",
}
_CALM_SECONDS = (10.0, 5.0)  # until what was disturbed is past, and of mail after that
# What a copy may take that has lost its job and whose lease has not ended: that, and what two sweeps and a retry take.
_DRAIN_SECONDS = 60.0 + 3 * 5.0 + 10.0 + 15.0
_SOURCE_SECONDS = 150.0
_STRAY = "stray failed job: deleted"


class Soak:
    """One run in one folder."""

    def __init__(self, folder: Path, stack: ExitStack, *, seed: int, sessions: int, quiet: bool) -> None:
        self.folder = folder
        self.seed = seed
        self.quiet = quiet
        self.done: list[Disturbance] = []
        self.findings: Counter[str] = Counter()
        self.begun = time.monotonic()
        self.servers = [self._server(stack, name, n) for n, name in enumerate(("primary", "backup-1", "backup-2"))]
        addresses = [server.address for server in self.servers]
        self.primaries = [(0.0, addresses[0])]
        self.calm = 0.0
        self.failed: list[dict[str, object]] = []
        settings = {**SETTINGS, "workers.processes": str(1 + seed % 2)}
        self.product = Product(folder, primary=addresses[0], backups=addresses[1:], settings=settings)
        stack.callback(self.product.clean_up)
        self.disturber = Disturber(self.product, self.servers, seed, self._note)
        stack.callback(self.disturber.clean_up)
        self.product.start()
        words = [str(self.product.smtp_port), str(folder / "accepted"), str(sessions), str(seed), "--kind", "varied"]
        self.source = programs.start(stack, "numbered_source", *words, port=self.product.smtp_port, told=True)

    def run(self, seconds: float) -> audit.Verdict:
        """Disturb for so long, with a cut-over in the middle, drain, and return what the audit found."""
        self._disturb(seconds / 2)
        self._cut_over()
        self._disturb(seconds / 2)
        self.disturber.end()
        self.say("everything runs")
        self._rest(_CALM_SECONDS[0])
        self.calm = time.time()
        self._rest(_CALM_SECONDS[1])
        faults = self._drain()
        verdict = audit.examine(
            audit.Records(
                accepted=self.folder / "accepted",
                servers={server.address: self.folder / server.name for server in self.servers},
                primaries=self.primaries,
                log=self.product.log_file,
                refusing=frozenset(s.address for s in self.servers if s.refuses),
                failed=self.failed,
                done=self.done,
                calm=self.calm,
            )
        )
        verdict.faults += faults
        return verdict

    def _disturb(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        following = time.monotonic() + 1.0
        while time.monotonic() < end:
            self.disturber.look()
            if time.monotonic() >= following:
                following = time.monotonic() + self.disturber.step()
            time.sleep(0.05)

    def _rest(self, seconds: float) -> None:
        """Disturb nothing for so long; what ends by itself all the same is started again, and seen."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.disturber.look()
            time.sleep(0.05)

    def _cut_over(self) -> None:
        """Have the primary and the first backup exchange their roles, as docs/migration.md does it."""
        self.disturber.stop()
        new, old = self.servers[1], self.servers[0]
        self.servers[:2] = [new, old]
        self.primaries.append((time.time(), new.address))
        self.product.settings["relay.destination_primary"] = new.address
        self.product.settings["relay.destination_backups"] = ",".join(s.address for s in self.servers[1:])
        self._note(Disturbance(time.time(), "cut over"))
        self.disturber.start()

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self.begun:7.1f} {text}", flush=True)

    def _note(self, disturbance: Disturbance) -> None:
        self.done.append(disturbance)
        self.say(disturbance.what)

    def _server(self, stack: ExitStack, name: str, number: int) -> Server:
        port = free_port()
        words = [str(port), str(self.folder / name), str(1000 * self.seed + number)]
        refuses = name == "backup-2"  # never a primary: a client would have to hear of it
        words += ["--refuses"] if refuses else []
        process = programs.start(stack, "recording_server", *words, port=port, told=True)
        server = Server(name, f"127.0.0.1:{port}", process, refuses)
        # A stalled one does not hear that it shall end.
        stack.callback(server.process.send_signal, signal.SIGCONT)
        return server

    def _drain(self) -> list[str]:
        """Have the source come to its end and the product deliver what it owes; returns what is wrong."""
        self.say("draining")
        faults = []
        assert self.source.stdin is not None
        self.source.stdin.close()
        try:
            if self.source.wait(_SOURCE_SECONDS):
                faults.append("not all mail was accepted within two minutes of the last disturbance")
        except subprocess.TimeoutExpired:
            faults.append("the source of mail hangs")
        begun = time.monotonic()
        while (left := self._left()) and time.monotonic() - begun < _DRAIN_SECONDS:
            time.sleep(0.2)
        if left:
            return [*faults, f"not drained in {_DRAIN_SECONDS:g} s by itself: {left}"]
        self.say(f"drained in {time.monotonic() - begun:.1f} s")
        self.failed = self.product.json("failed", "list")
        verified = self.product.run("queue", "verify", "--json").stdout
        found = Counter(f"{row['finding']}: {row['action']}" for row in map(json.loads, verified.splitlines()))
        # Of a copy that another worker has delivered: the sweep deletes it within a minute.
        if count := found.pop(_STRAY, 0):
            self.findings[_STRAY] += count
        faults += [f"queue verify found something at the end: {count} {what}" for what, count in found.items()]
        with redis.Redis.from_url(self.product.redis_url) as connection:
            bodies = {key.decode().removeprefix(keys.MESSAGE) for key in connection.scan_iter(keys.MESSAGE + "*")}
        bodies -= {str(row["id"]) for row in self.failed}
        faults += [f"{len(bodies)} bodies that nobody lists: {' '.join(sorted(bodies)[:10])}"] if bodies else []
        corrupt = writer.summary(self.product.state_dir / "spool").corrupt
        halves = "half-written files, whose clients got no 2xx, are set aside in the spool"
        self.findings.update({halves: corrupt} if corrupt else {})
        if (status := self.product.stop()) != 0:
            faults.append(f"the product ended with {status}")
        return faults

    def _left(self) -> dict[str, int]:
        """Return what is not yet where it belongs."""
        try:
            with redis.Redis.from_url(self.product.redis_url) as connection:
                left = {f"pending for {row.destination}": row.pending for row in overview.summary(connection)}
                left["staged"] = connection.zcard(keys.STAGED)
                left["uncertain"] = connection.zcard(keys.UNCERTAIN)
        except redis.RedisError as error:
            return {f"Redis: {error}": 1}
        left["in the spool"] = writer.summary(self.product.state_dir / "spool").messages
        return {name: count for name, count in left.items() if count}


def report(soak: Soak, verdict: audit.Verdict, seconds: float) -> str:
    """Return the result as text."""
    lines = [
        f"seed {soak.seed}: {verdict.accepted} messages accepted in {seconds:.0f} s, {len(soak.done)} disturbances",
        *(f"  {count:8d} {what}" for what, count in verdict.figures.items()),
        "duplicates and uncertain copies, by the death that the log names, or else by what was done last before:",
        *(f"  {count:8d} {what}" for what, count in verdict.causes.most_common()),
        "also:",
        *(f"  {count:8d} {what}" for what, count in soak.findings.most_common()),
        "warnings and errors in the log:",
        *(f"  {count:8d} {what}" for what, count in verdict.trouble.most_common(25)),
        *(f"FAULT: {text}" for text in verdict.faults),
        "nothing lost or changed, every duplicate explained"
        if not verdict.faults
        else f"kept for inspection: {soak.folder}",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--quiet", action="store_true", help="only the result")
    parser.add_argument("--keep", action="store_true", help="keep the folder in any case")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)  # as Ctrl-C: everything that was started is stopped
    folder = Path(tempfile.mkdtemp(prefix="smtp-dup-soak-"))
    verdict = None
    try:
        with ExitStack() as stack:
            soak = Soak(folder, stack, seed=given.seed, sessions=given.sessions, quiet=given.quiet)
            verdict = soak.run(given.minutes * 60)
    finally:
        if verdict is None:
            print(f"broken off; the records are in {folder}")
    print(report(soak, verdict, given.minutes * 60))
    if not verdict.faults and not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(verdict.faults))


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
