"""The product as an operator runs it: `smtp-dup ...` in processes of its own, on free ports, in a temporary folder.

What it writes on stderr and stdout is in ``log``; whatever a test does, no process of it is left behind.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import relay
from relay.mail import encryption
from relay.redisio import embedded
from support import forked, prepared_process, running_processes
from support.child_processes import tied
from support.dialogue import Dialogue, Unexpected
from support.forked import ForkedProcess
from support.waiting import PATIENCE, free_port, wait_until

_SOURCE = Path(relay.__file__).parent.parent  # the code under test, installed or not
_COMMAND = [sys.executable, "-m", "relay.command"]
# Servers of a test answer at once or not at all, and what is put off comes again soon.
QUICK = {
    "retry.first": "1",
    "retry.longest": "2",
    "relay.timeout_seconds": "2",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
}
# The product's own pauses that come one after the other until something has been seen and done: for ``waits``.
SOON = {
    "relay.server.relay_process._MONITOR_SECONDS": 0.25,  # a look at Redis, a sign of life
    "relay.ledger.monitor._CALM_SECONDS": 0.5,  # until a Redis that answers again is trusted with the spool
    "relay.spool.importer._LOOK_SECONDS": 0.25,
    "relay.daemon.supervisor._ROSTER_EVERY": 0.5,  # who else needs workers
    "workers.rqworker.scheduler._ROUND_SECONDS": 0.25,  # what is due
}
_DEFAULTS = {
    "smtp.processes": "1",
    "log.format": "json",
    "log.level": "debug",  # it says which process is which; see ``child``
    "spool.min_free": "1M",
    "ready.check_every": "0",  # a test's servers count their sessions
}


@dataclass(frozen=True)
class Child:
    """One process of the product."""

    pid: int
    parent: int
    command: str

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Product:
    """One `smtp-dup up`, `relay` or `workers`, with its own state folder, SMTP port and status port.

    ``settings`` are keys as in settings.toml (``{"retry.first": "1", "smtp.processes": "2"}``), given as environment
    variables; ``flags`` are added to the command line; ``files`` are written into its working folder before it starts.
    ``source`` is the tree that is run, by default the one under test. ``waits`` are constants of the product that say
    how long it waits, in seconds (``{"relay.daemon.supervisor._ROSTER_EVERY": 0.5}``): where it is no fork they stay as
    they are, and the test takes longer.
    Without ``redis_url`` it has the embedded Redis (``up`` only).
    """

    forks = False  # in tests: see conftest.py. A benchmark measures what is started as it is elsewhere

    def __init__(
        self,
        directory: Path,
        *,
        primary: str = "",
        backups: Iterable[str] = (),
        command: str = "up",
        redis_url: str = "",
        settings: Mapping[str, str] | None = None,
        flags: Iterable[str] = (),
        files: Mapping[str, str] | None = None,
        source: Path = _SOURCE,
        waits: Mapping[str, float] | None = None,
    ) -> None:
        self.directory = directory
        self.source = source
        self.waits = {**(waits or {})}
        self.state_dir = directory / "state"
        self.command = command
        self.flags = tuple(flags)
        self.smtp_port = free_port()
        self.status_port = free_port()
        self.settings = {
            **_DEFAULTS,
            "smtp.listen": f"127.0.0.1:{self.smtp_port}",
            "status.listen": f"127.0.0.1:{self.status_port}",
            "state_dir": str(self.state_dir),
            "relay.destination_primary": primary,
            "relay.destination_backups": ",".join(backups),
            "redis.url": redis_url,
            "storage.key_file": str(ring.path) if (ring := encryption.ring()) else "",
            **(settings or {}),
        }
        self.log_file = directory / f"{command}.log"
        self.process: subprocess.Popen[bytes] | ForkedProcess | None = None
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, text in (files or {}).items():
            (self.directory / name).write_text(text)

    def sibling(self, command: str, **settings: str) -> Product:
        """Return another command on the same settings and state folder: ``relay.sibling("workers")``."""
        other = Product(self.directory, command=command, waits=self.waits)
        other.smtp_port = self.smtp_port
        other.settings = {
            **self.settings,
            "status.listen": f"127.0.0.1:{other.status_port}",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return other

    # Life

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.clean_up()

    def start(self, wait: bool = True) -> Self:
        """Start it, and wait until it is ready. ``start`` after ``stop`` or ``kill`` goes on with the same state."""
        with self.log_file.open("ab") as log:
            self.process = self._launch(self._argv(self.command, *self.flags), log)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = PATIENCE) -> None:
        """Wait until it greets on its SMTP port and says 200 on /readyz."""
        wait_until(self._is_ready, timeout, lambda: f"smtp-dup {self.command} is not ready:\n{self.log[-4000:]}", 0.05)

    def stop(self, timeout: float = PATIENCE) -> int:
        """Send SIGTERM, wait for its end, and return its exit status."""
        assert self.process is not None
        self.process.terminate()
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            tree = "\n".join(f"{c.pid} {c.command}" for c in self.children())
            raise AssertionError(f"not drained after {timeout:g} s:\n{tree}\n{self.log[-4000:]}") from None
        finally:
            self.clean_up()
        return status

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait until it ends by itself, and return its exit status."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL for every process of it at once, as a power cut would."""
        self.clean_up()

    def clean_up(self) -> None:
        """Leave nothing behind."""
        if self.process is None:
            return
        # Every process is in the session that it was started with, whatever its process group.
        while left := running_processes.of_session(self.process.pid):
            running_processes.kill(left)
        self.process.wait()
        self.process = None

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def children(self, pattern: str = "") -> list[Child]:
        """Return its processes but the first, those whose command line matches; kill one to see what happens."""
        assert self.process is not None
        found = []
        for process in running_processes.running():
            if process.session == self.process.pid != process.pid:
                command = running_processes.command_line(process.pid)
                if re.search(pattern, command):
                    found.append(Child(process.pid, process.parent, command))
        return found

    def child(self, name: str) -> Child:
        """Return the running process of this name (``relay-1``, ``redis``...), as the supervisor's log names it."""

        def find() -> Child | None:
            started = re.findall(r"(\S+) started as process (\d+)", self.log.replace('"', " "))
            pid = {given: int(number) for given, number in started}.get(name)
            return next((child for child in self.children() if child.pid == pid), None)

        return wait_until(find, message=lambda: f"no process {name}:\n{self.log[-4000:]}")

    # Seeing

    @property
    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """The lines of the log that are JSON objects."""
        return _json_lines(self.log)

    def wait_for_log(self, text: str, timeout: float = PATIENCE) -> None:
        wait_until(lambda: text in self.log, timeout, lambda: f"{text!r} in the log:\n{self.log[-4000:]}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.smtp_port}"

    @property
    def redis_url(self) -> str:
        """The URL of the Redis that it uses."""
        return self.settings["redis.url"] or embedded.url(self.state_dir)

    def dialogue(self, **options: Any) -> Dialogue:
        """Return a client that is connected and greeted."""
        return Dialogue(self.smtp_port, **options)

    def send(self, sender: str, *recipients: str, data: bytes | None = None) -> str:
        """Send one message in a connection of its own; return the reply to the dot."""
        with self.dialogue() as client:
            client.hello()
            reply = client.mail(sender, *recipients, data=data)
            client.quit()
        return reply

    def get(self, path: str) -> tuple[int, str]:
        """GET from the status server: the status and the text."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.status_port}{path}", timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have these labels; 0 without any."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            found = re.match(r"(\w+)(?:\{(.*)\})? (\S+)$", line)
            if found and found[1] == name:
                given = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
                total += float(found[3]) if labels.items() <= given.items() else 0
        return total

    # Commands

    def run(self, *words: str, input: str = "", timeout: float = 30) -> subprocess.CompletedProcess[str]:  # noqa: A002 - as run()'s
        """Run another command of the product with the same settings, whatever its exit status."""
        return forked.run(words, cwd=self.directory, env=self.environment, input=input, timeout=timeout)

    def json(self, *words: str) -> list[dict[str, Any]]:
        """Run a listing with --json; fails unless it ends with 0. Return its objects."""
        done = self.run(*words, "--json")
        assert done.returncode == 0, f"smtp-dup {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]

    def summary(self, destination: str | None = None) -> dict[str, Any]:
        """Return `queue summary` of a destination (default: the only one)."""
        rows = [row for row in self.json("queue", "summary") if destination in {None, row["destination"]}]
        assert len(rows) == 1, rows
        return rows[0]

    @property
    def environment(self) -> dict[str, str]:
        """What its processes get: nothing of smtp-dup's from outside, and the settings of this instance."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SMTP_DUP_")}
        path = os.pathsep.join(filter(None, (str(self.source), kept.get("PYTHONPATH", ""))))
        given = {f"SMTP_DUP_{key.replace('.', '_').upper()}": value for key, value in self.settings.items() if value}
        waits = " ".join(f"{place}={seconds}" for place, seconds in self.waits.items())
        return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", prepared_process.WAITS: waits, **given}

    def _argv(self, *words: str) -> list[str]:
        module = "relay.command" if (self.source / "relay/command").is_dir() else "relay.cli"  # as it was once called
        return [sys.executable, "-m", module, *words]

    def _launch(self, argv: list[str], log: IO[bytes]) -> subprocess.Popen[bytes] | ForkedProcess:
        """Start the command, as a fork of a process that has imported it where that makes no difference."""
        env = self.environment
        count = len(_COMMAND)
        if self.forks and self.source == _SOURCE and argv[:count] == _COMMAND and forked.fits(env):
            words = ["smtp-dup", *argv[count:]]
            return forked.start(words, cwd=self.directory, env=env, stdout=log, stderr=log, start_new_session=True)
        return subprocess.Popen(
            tied(argv),
            cwd=self.directory,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def _is_ready(self) -> bool:
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"smtp-dup {self.command} ended with {status}:\n{self.log[-4000:]}"
        try:
            if self.command != "workers":
                with Dialogue(self.smtp_port, timeout=5) as client:
                    client.quit()
            return not self.settings["status.listen"] or self.get("/readyz")[0] == 200
        except (OSError, Unexpected):
            return False


def _json_lines(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
