"""Private Redis servers for tests, run as the product runs its own, that can be killed, paused and brought back."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import redis

from relay.ledger.redis_clock import time_of
from relay.redisio import embedded
from support.child_processes import tied
from support.settable_clock import SettableClock
from support.waiting import PATIENCE, wait_until


class RedisServer:
    """One server on a unix socket below ``directory``; its data outlives ``stop`` and ``kill``.

    ``options`` are appended to the product's own, to spoil them: ``RedisServer(d, appendfsync="everysec")``.
    """

    def __init__(self, directory: Path, clock: SettableClock | None = None, **options: str) -> None:
        self.directory = directory
        self.clock = clock
        self.options = options
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return embedded.url(self.directory)

    def client(self, **options: object) -> redis.Redis:
        """Return a new client; it is up to the caller to close it."""
        return redis.Redis.from_url(self.url, **options)

    def start(self, timeout: float = PATIENCE) -> RedisServer:
        embedded._make_private(embedded.folder(self.directory))
        embedded.make_socket_folder(self.directory)
        words = [w for name, value in self.options.items() for w in (f"--{name.replace('_', '-')}", value)]
        self.process = subprocess.Popen(
            tied([*embedded.server_argv(self.directory), *words]),
            env=embedded.environment() | (self.clock.environment if self.clock else {}),
            process_group=0,
        )
        embedded.wait_ready(self.directory, timeout, self.process)
        return self

    def stop(self) -> None:
        """End it in order."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            embedded.stop(self.process, 10)
            self.process = None

    def set_clock(self, seconds: float) -> None:
        """Set its clock to so many seconds off the machine's, and wait until it has seen that."""
        assert self.clock is not None
        self.clock.set(seconds)
        with self.client() as client:
            wait_until(lambda: abs(time_of(client.time()) - time.time() - seconds) < 1)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Let it hang: connections are accepted by the kernel, nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        self.stop()
        self.start()
