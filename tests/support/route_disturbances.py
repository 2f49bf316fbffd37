"""What happens to relay hosts, their Redis and the servers behind them, by a seed as far as the clock allows.

Servers hang, refuse, hang up or are away at every step of a transaction; processes, hosts and Redis are killed and
stalled; one host goes by other settings than the others for a while.
"""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from support.dialogue import Unexpected
from support.product import Product
from support.reactions import Close, Delay, HalfClose, Reset, Silence
from support.route_hosts import NAMES, Hosts
from support.scripted_server import ScriptedServer

_MOODS: dict[str, dict[str, object]] = {
    "hangs in connect": {"CONNECT": Silence()},
    "hangs in EHLO": {"EHLO": Silence()},
    "hangs in MAIL": {"MAIL": Silence()},
    "hangs in RCPT": {"RCPT": Silence()},
    "hangs in DATA": {"DATA": Silence()},
    "hangs at the dot": {".": Silence()},
    "slow at the dot": {".": (Delay(3.5), None)},
    "takes it and hangs up": {".": (Delay(0.2), Reset())},
    "421 in the greeting": {"CONNECT": ("421 4.3.2 busy", Close())},
    "421 at MAIL": {"MAIL": ("421 4.3.2 busy", Close())},
    "421 at RCPT": {"RCPT": ("421 4.3.2 busy", Close())},
    "421 at the dot": {".": ("421 4.3.2 busy", Close())},
    "4xx at MAIL": {"MAIL": "451 4.7.1 later"},
    "4xx at RCPT": {"RCPT": "450 4.2.0 later"},
    "4xx at the dot": {".": "451 4.3.0 later"},
    "closes at RCPT": {"RCPT": HalfClose()},
    "closes at DATA": {"DATA": Close()},
    "5xx at RCPT": {"RCPT": "550 5.1.1 unknown"},
    "5xx at the dot": {".": "554 5.6.0 spam"},
    "refuses EHLO": {"EHLO": "550 5.3.0 no", "HELO": "550 5.3.0 no"},
}


class Disturber:
    """Upsets servers, kills and stalls processes of all hosts and Redis, and reloads hosts, by a seed."""

    def __init__(self, hosts: Hosts, seed: int, *, kills: bool = True) -> None:
        self._hosts, self._source = hosts, random.Random(f"disturbances {seed}")
        self.done: list[str] = []
        self._until: list[tuple[float, str, Callable[[], None]]] = []
        self._acts: list[tuple[int, Callable[[], None]]] = [(10, self._upset), (2, self._flap), (2, self._reload)]
        if kills:
            self._acts += [
                (3, lambda: self._kill(self._hosts.relays, r"relay-\d")),
                (2, lambda: self._kill(self._hosts.workers, "worker-")),
                (1, lambda: self._kill(self._hosts.relays, "housekeeping")),
                (1, self._lose_host),
                (1, self._kill_redis),
                (2, lambda: self._stall(self._hosts.relays)),
                (1, self._stall_redis),
            ]
        if hosts.links:
            self._acts.append((4, self._cut_off))

    def step(self) -> float:
        """Do the next thing; returns the seconds to the one after it."""
        self.look()
        weights = [weight for weight, _ in self._acts]
        self._source.choices(self._acts, weights)[0][1]()
        return self._source.uniform(0.2, 1.5)

    def look(self) -> None:
        """End what has lasted long enough."""
        now = time.monotonic()
        due = [entry for entry in self._until if entry[0] <= now]
        self._until = [entry for entry in self._until if entry[0] > now]
        for _, _, undo in due:
            undo()

    def end(self) -> None:
        """Undo everything that lasts, and see all hosts ready."""
        for _, _, undo in self._until:
            undo()
        self._until = []
        for server in self._hosts.servers.values():
            self._calm(server)
        for host in self._hosts.all:
            host.wait_ready(90)

    def _say(self, text: str) -> None:
        self.done.append(f"{time.strftime('%H:%M:%S')} {text}")

    def _later(self, seconds: float, name: str, undo: Callable[[], None]) -> None:
        self._until.append((time.monotonic() + seconds, name, undo))

    def _is_upset(self, name: str) -> bool:
        return any(other == name for _, other, _ in self._until)

    @staticmethod
    def _calm(server: ScriptedServer) -> None:
        silent = any("Silence" in repr(reaction) for reaction in server.replies.values())
        server.replies.clear()
        if silent:
            server.drop()  # who has fallen silent never says anything again
        server.listen()

    def _upset(self) -> None:
        name = self._source.choice(NAMES)
        mood, seconds = self._source.choice(["down", *_MOODS]), self._source.uniform(0.3, 5)
        if self._is_upset(name):
            return
        server = self._hosts.servers[name]
        self._say(f"{name}: {mood} for {seconds:.1f} s")
        if mood == "down":
            server.down()
        else:
            server.replies.update(_MOODS[mood])
        self._later(seconds, name, lambda: self._calm(server))

    def _flap(self) -> None:
        """Take a server down and up again several times."""
        name = self._source.choice("abc")
        if self._is_upset(name):
            return
        server = self._hosts.servers[name]
        self._say(f"{name} flaps")
        for n in range(4):
            self._later(0.6 * n, name, server.down)
            self._later(0.6 * n + 0.3, name, server.listen)

    def _reload(self) -> None:
        """Have one host go by other settings than the others for a while."""
        host = self._source.choice(self._hosts.relays)
        name = host.directory.name
        if self._is_upset(f"settings of {name}") or not _greets(host):
            return
        self._hosts.write_routes(
            host,
            trio=self._source.choice(('["a", "b", "c"]', '["c", "b", "a"]', '["b", "c", "a"]')),
            return_after=self._source.choice(("1s", "3s")),
            weight=self._source.randrange(1, 6),
        )
        self._say(f"{name} reloads")
        self._signal(host, signal.SIGHUP)

        def back() -> None:
            self._hosts.write_routes(host)
            if _greets(host):  # a start reads the file, and listens to a signal only later
                self._signal(host, signal.SIGHUP)

        self._later(self._source.uniform(3, 8), f"settings of {name}", back)

    @staticmethod
    def _signal(host: Product, number: int) -> None:
        with suppress(OSError, AssertionError):
            assert host.process is not None
            host.process.send_signal(number)

    def _kill(self, of: Sequence[Product], pattern: str) -> None:
        host = self._source.choice(of)
        if self._is_upset(host.directory.name):
            return
        started = dict(re.findall(r'"event": "(\S+) started as process (\d+)"', host.log))
        alive = {child.pid: child for child in host.children()}
        found = [(n, alive[int(p)]) for n, p in sorted(started.items()) if re.match(pattern, n) and int(p) in alive]
        if found:
            name, child = self._source.choice(found)
            self._say(f"{host.directory.name} {name} killed")
            with suppress(OSError):
                child.kill()

    def _lose_host(self) -> None:
        host = self._source.choice(self._hosts.all)
        name = host.directory.name
        if self._is_upset(name):
            return
        self._say(f"{name} killed whole")
        host.kill()
        self._later(self._source.uniform(0, 4), name, lambda: host.start(wait=False) and None)

    def _kill_redis(self) -> None:
        if self._is_upset("redis"):
            return
        self._say("Redis killed")
        self._hosts.redis.kill()
        self._later(self._source.uniform(0, 3), "redis", lambda: self._hosts.redis.start() and None)

    def _stall_redis(self) -> None:
        if self._is_upset("redis"):
            return
        self._say("Redis stalled")
        self._hosts.redis.pause()
        self._later(self._source.uniform(0.5, 4), "redis", self._hosts.redis.resume)

    def _cut_off(self) -> None:
        """Cut one host off from Redis; what it has sent then may arrive late, or never."""
        host, is_late = self._source.choice(self._hosts.all), self._source.random() < 0.5
        name = f"link of {host.directory.name}"
        if self._is_upset(name):
            return
        self._say(f"{host.directory.name} cut off from Redis")
        link = self._hosts.links[host]
        link.cut()

        def mend() -> None:
            if not is_late:
                link.break_off()
            link.mend()

        self._later(self._source.uniform(0.5, 6), name, mend)

    def _stall(self, of: Sequence[Product]) -> None:
        host = self._source.choice(of)
        if self._is_upset(host.directory.name):
            return
        children = [c for c in host.children() if c.pid != (host.process.pid if host.process else 0)]
        if children:
            child = self._source.choice(sorted(children, key=lambda c: c.pid))
            self._say(f"{host.directory.name} process {child.pid} stalled")
            with suppress(OSError):
                child.signal(signal.SIGSTOP)

            def on() -> None:
                with suppress(OSError):
                    child.signal(signal.SIGCONT)

            self._later(self._source.uniform(0.3, 4), f"stall {child.pid}", on)


def _greets(host: Product) -> bool:
    with suppress(OSError, Unexpected), host.dialogue(timeout=2) as client:
        client.quit()
        return True
    return False
