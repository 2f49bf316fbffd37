"""``python -m bench.soak --minutes N --seed S``: numbered mail at full speed while everything is killed and stalled.

The real product with its embedded Redis and two backups; the primary and the backups go down, stall, and answer with
nonsense too. In the end all is let run and drained, then audited: what was accepted is at the primary and at each
backup, and every duplicate has its line in the log. The exit status is 1 on any loss or unexplained duplicate; the
folder with every record and the whole log (some 100 MB a minute) is kept then, else deleted.
"""

from __future__ import annotations

import argparse
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
from product import Product
from relay import ledger, spool
from waiting import free_port

SETTINGS = {
    "smtp.processes": "2",
    "retry.first": "1",
    "retry.longest": "4",
    "retry.give_up": "1h",
    "relay.timeout_seconds": "5",
    "relay.final_timeout_seconds": "8",
    "relay.uncertain_hold": "3",
    "redis.timeout_seconds": "2",
}
_DRAIN_SECONDS = 240.0
_SOURCE_SECONDS = 150.0


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
        self.backups = {server.address: server.name for server in self.servers[1:]}
        settings = {**SETTINGS, "workers.processes": str(1 + seed % 2)}
        self.product = Product(folder, primary=addresses[0], backups=addresses[1:], settings=settings)
        stack.callback(self.product.clean_up)
        self.disturber = Disturber(self.product, self.servers, seed, self._note)
        stack.callback(self.disturber.clean_up)
        self.product.start()
        words = [str(self.product.smtp_port), str(folder / "accepted"), str(sessions), str(seed)]
        self.source = programs.start(stack, "numbered_source", *words, port=self.product.smtp_port, told=True)

    def run(self, seconds: float) -> audit.Verdict:
        """Disturb for so long, drain, and return what the audit found."""
        end = time.monotonic() + seconds
        following = time.monotonic() + 1.0
        while time.monotonic() < end:
            self.disturber.look()
            if time.monotonic() >= following:
                following = time.monotonic() + self.disturber.step()
            time.sleep(0.05)
        self.disturber.end()
        faults = self._drain()
        backups = {address: self.folder / name for address, name in self.backups.items()}
        verdict = audit.examine(
            self.folder / "accepted", self.folder / "primary", backups, self.product.log_file, self.done
        )
        verdict.faults += faults
        return verdict

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self.begun:7.1f} {text}", flush=True)

    def _note(self, disturbance: Disturbance) -> None:
        self.done.append(disturbance)
        self.say(disturbance.what)

    def _server(self, stack: ExitStack, name: str, number: int) -> Server:
        port = free_port()
        words = [str(port), str(self.folder / name), str(1000 * self.seed + number)]
        process = programs.start(stack, "recording_server", *words, port=port, told=True)
        server = Server(name, f"127.0.0.1:{port}", process)
        # A stalled one does not hear that it shall end.
        stack.callback(server.process.send_signal, signal.SIGCONT)
        return server

    def _drain(self) -> list[str]:
        """Have the source come to its end and the product deliver what it owes; returns what is wrong."""
        self.say("everything runs: draining")
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
            for row in self.product.json("queue", "verify"):
                self.findings[f"{row['finding']}: {row['action'].partition(' as ')[0]}"] += 1
        if left:
            return [*faults, f"not drained in {_DRAIN_SECONDS:g} s: {left}"]
        self.say(f"drained in {time.monotonic() - begun:.1f} s")
        with redis.Redis.from_url(self.product.redis_url) as connection:
            bodies = [key.decode() for key in connection.scan_iter(ledger.MESSAGE + "*", count=1000)]
            failed = sum(row.failed for row in ledger.summary(connection))
        faults += [f"{len(bodies)} bodies that nobody lists: {' '.join(bodies[:10])}"] if bodies else []
        faults += [f"{failed} copies failed, though no server refused anything"] if failed else []
        corrupt = spool.summary(self.product.state_dir / "spool").corrupt
        halves = "half-written files, whose clients got no 2xx, are set aside in the spool"
        self.findings.update({halves: corrupt} if corrupt else {})
        if (status := self.product.stop()) != 0:
            faults.append(f"the product ended with {status}")
        return faults

    def _left(self) -> dict[str, int]:
        """Return what is not yet where it belongs."""
        try:
            with redis.Redis.from_url(self.product.redis_url) as connection:
                left = {f"pending for {row.destination}": row.pending for row in ledger.summary(connection)}
                left["staged"] = connection.zcard(ledger.STAGED)
                left["uncertain"] = connection.zcard(ledger.UNCERTAIN)
        except redis.RedisError as error:
            return {f"Redis: {error}": 1}
        left["in the spool"] = spool.summary(self.product.state_dir / "spool").messages
        return {name: count for name, count in left.items() if count}


def report(soak: Soak, verdict: audit.Verdict, seconds: float) -> str:
    """Return the result as text."""
    lines = [
        f"seed {soak.seed}: {verdict.accepted} messages accepted in {seconds:.0f} s, {len(soak.done)} disturbances",
        *(f"  {count:8d} {what}" for what, count in verdict.figures.items()),
        "duplicates and uncertain copies, by the death that the log names, or else by what was done last before:",
        *(f"  {count:8d} {what}" for what, count in verdict.causes.most_common()),
        "findings of queue verify at the end:",
        *(f"  {count:8d} {what}" for what, count in soak.findings.most_common()),
        "warnings and errors in the log:",
        *(f"  {count:8d} {what}" for what, count in verdict.trouble.most_common(25)),
        *(f"FAULT: {text}" for text in verdict.faults),
        "nothing lost, every duplicate explained" if not verdict.faults else f"kept for inspection: {soak.folder}",
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
