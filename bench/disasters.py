"""``python -m bench.disasters NAME...``: disasters of storage and of processes under mail, with an audit after each.

The real product on a Redis of its own gets numbered mail, sparse enough for first tries from memory; what happens to it
is a function here. Then all is well again, what is owed drains by itself, and bench/audit.py compares what was promised
with what each server has, the failed list and the log. What an operator sees meanwhile is printed: /readyz and
`queue summary`. The exit status is 1 on any fault. Without a name it runs all, some ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

if __package__ in {None, ""}:  # run by its path: only the folder above may be searched, some names here are common
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import redis

from bench import audit, programs
from bench.disturbances import Parts, Server
from bench.soak import SETTINGS
from relay.ledger import keys, overview
from relay.spool import writer
from support import failing_disk
from support.failing_disk import TROUBLES, FailingDisk
from support.product import Product
from support.redis_servers import RedisServer
from support.waiting import free_port

_SOURCE_SECONDS = 150.0
_DRAIN_SECONDS = 150.0
_WORKERS = 2


class Site:
    """A product with a primary and a backup under mail, in a folder."""

    def __init__(self, folder: Path, stack: ExitStack, *, rate: float) -> None:
        self.folder = folder
        self.servers = [self._server(stack, name) for name in ("primary", "backup")]
        self.redis = RedisServer(folder / "redis")
        (folder / "redis").mkdir()
        self.redis.start()
        stack.callback(self.redis.stop)
        library = failing_disk.compile_into(folder)
        self.disk = FailingDisk(library, folder / "plan", folder / "state/spool")
        stack.enter_context(_environment(self.disk.environment))
        self.product = Product(
            folder,
            primary=self.servers[0].address,
            backups=[self.servers[1].address],
            redis_url=self.redis.url,
            settings={
                **SETTINGS,
                "relay.timeout_seconds": "10",
                "relay.require_durable_copies": "true",
                "smtp.processes": "1",
                "workers.processes": str(_WORKERS),
            },
        )
        stack.callback(self.product.clean_up)
        self.product.start()
        self.parts = Parts(self.product)
        port = str(self.product.smtp_port)
        words = [
            port,
            str(folder / "accepted"),
            "8",
            "1",
            "--kind",
            "varied",
            "--rate",
            str(rate),
            "--count",
            str(10**9),
        ]
        self._source = programs.start(stack, "numbered_source", *words, port=self.product.smtp_port, told=True)

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def look(self, what: str) -> None:
        """Print what an operator sees now."""
        status, text = self.product.get("/readyz")
        told = json.loads(text)
        print(f"  {what}: /readyz {status} {' '.join(told['reasons'] + told['warnings'])}", flush=True)
        print("".join(f"    {line}\n" for line in self.product.run("queue", "summary").stdout.splitlines()), end="")

    def run(self, *words: str) -> None:
        """Run a command of the product, and print what it says."""
        done = self.product.run(*words, timeout=120)
        print(f"  {' '.join(words)}: {done.returncode} {(done.stdout + done.stderr).strip()[-200:]}", flush=True)

    def end(self) -> audit.Verdict:
        """Have the mail end and everything drain; return what the audit finds."""
        faults = []
        assert self._source.stdin is not None
        self._source.stdin.close()
        if self._source.wait(_SOURCE_SECONDS):
            faults.append("not all mail was accepted in the end")
        deadline = time.monotonic() + _DRAIN_SECONDS
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        faults += [f"not drained: {left}"] if left else []
        failed = self.product.json("failed", "list")
        faults += [f"queue verify: {row['finding']}" for row in self.product.json("queue", "verify")]
        if self.product.stop():
            faults.append("it has not stopped in order")
        verdict = audit.examine(
            audit.Records(
                accepted=self.folder / "accepted",
                servers={server.address: self.folder / server.name for server in self.servers},
                primaries=[(0.0, self.servers[0].address)],
                log=self.product.log_file,
                refusing=frozenset(s.address for s in self.servers if s.refuses),
                failed=failed,
            )
        )
        verdict.faults += faults
        return verdict

    def _server(self, stack: ExitStack, name: str) -> Server:
        port = free_port()
        process = programs.start(
            stack, "recording_server", str(port), str(self.folder / name), "1", port=port, told=True
        )
        return Server(name, f"127.0.0.1:{port}", process)

    def _left(self) -> dict[str, int]:
        try:
            with self.redis.client() as connection:
                left = {f"pending for {row.destination}": row.pending for row in overview.summary(connection)}
                left |= {name: connection.zcard(name) for name in (keys.STAGED, keys.UNCERTAIN)}
        except redis.RedisError as error:
            return {str(error): 1}
        left["in the spool"] = writer.summary(self.product.state_dir / "spool").messages
        return {name: count for name, count in left.items() if count}


# What happens


def worker_stopped(site: Site) -> None:
    """One of two workers stands still for longer than its leases last, with copies in hand, and goes on."""
    site.servers[1].turn("slow")
    site.rest(2)
    worker = next(iter(site.parts.named("worker-").values()))
    os.kill(worker, signal.SIGSTOP)
    site.servers[1].turn("well")
    site.rest(80)
    site.look("one worker has stood still for 80 s")
    os.kill(worker, signal.SIGCONT)


def held_and_throttled(site: Site) -> None:
    """An operator holds, releases and throttles the backup, again and again, while first tries are under way."""
    name = site.servers[1].address
    site.servers[1].turn("slow")
    for _ in range(3):
        site.run("hold", name, "--for", "1m", "--reason", "a trial")
        site.rest(1)
        site.run("release", name)
        site.run("throttle", name, "--rate", "5/s")
        site.rest(1)
        site.run("throttle", name, "--off")
    site.servers[1].turn("well")


def redis_full(site: Site) -> None:
    """Every write is answered with OOM."""
    with _configured(site, "maxmemory", "1"):
        site.rest(15)
        site.look("Redis is full")


def redis_a_replica(site: Site) -> None:
    """Every write is answered with READONLY."""
    with site.redis.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        site.rest(15)
        site.look("Redis is a replica")
        client.execute_command("REPLICAOF", "NO", "ONE")


def redis_wants_a_password(site: Site) -> None:
    """New connections are answered with NOAUTH."""
    with _configured(site, "requirepass", "secret") as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        site.rest(15)
        site.look("Redis wants a password")


def redis_busy(site: Site) -> None:
    """A script of somebody else keeps Redis for 20 seconds: BUSY."""
    words = "local t=redis.call('TIME')[1] while redis.call('TIME')[1]-t < 20 do end"
    with _configured(site, "busy-reply-threshold", "200"), site.redis.client(socket_timeout=60) as client:
        script = threading.Thread(target=client.eval, args=(words, 0))
        script.start()
        site.rest(12)
        site.look("Redis is busy")
        script.join()


def redis_forgets_on_restart(site: Site) -> None:
    """An administrator sets `appendonly no` while mail goes on, and takes it back."""
    with _configured(site, "appendonly", "no"):
        site.rest(70)
        site.look("Redis has no log")


def disk_fails(site: Site) -> None:
    """Redis is away, and the spool's disk fails in each of its ways."""
    site.redis.stop()
    site.rest(3)
    for name, (error, what) in TROUBLES.items():
        site.disk.fail(error, what)
        site.rest(3)
        site.look(f"Redis away, the spool's disk: {name}")
        site.disk.mend()
        site.rest(1)
    site.redis.start()


DISASTERS: dict[str, Callable[[Site], None]] = {
    act.__name__.replace("_", "-"): act
    for act in (
        worker_stopped,
        held_and_throttled,
        redis_full,
        redis_a_replica,
        redis_wants_a_password,
        redis_busy,
        redis_forgets_on_restart,
        disk_fails,
    )
}


@contextmanager
def _configured(site: Site, name: str, value: str) -> Iterator[redis.Redis]:
    """Have a setting of Redis changed for a while."""
    with site.redis.client() as client:
        before = client.config_get(name)[name]
        client.config_set(name, value)
        yield client
        client.config_set(name, before)


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def endure(name: str, *, rate: float) -> bool:
    """Have one disaster happen; returns whether all is well after it."""
    begun = time.monotonic()
    print(f"{name}: {(DISASTERS[name].__doc__ or '').strip()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="smtp-dup-disaster-") as folder, ExitStack() as stack:
        site = Site(Path(folder), stack, rate=rate)
        site.rest(3)
        DISASTERS[name](site)
        site.rest(5)
        site.look("all is well again")
        verdict = site.end()
    figures = ", ".join(f"{count} {what}" for what, count in verdict.figures.items() if count)
    print(f"  {verdict.accepted} messages accepted in {time.monotonic() - begun:.0f} s; {figures or 'nothing twice'}")
    print("".join(f"    {count} {what}\n" for what, count in verdict.trouble.most_common(8)), end="")
    print("".join(f"  FAULT: {text[:500]}\n" for text in verdict.faults), end="")
    return not verdict.faults


def main() -> int:
    """Run what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *DISASTERS], help="default: all")
    parser.add_argument("--rate", type=float, default=30.0, help="messages a second")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: everything that was started is stopped
    well = [endure(name, rate=given.rate) for name in given.name or DISASTERS]
    print("nothing lost or changed, every duplicate explained" if all(well) else "there are faults")
    return int(not all(well))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
