"""A master, replicas and Sentinels on loopback, with the product's own server program, to be killed and paused."""

from __future__ import annotations

import secrets
import signal
import subprocess
from pathlib import Path

import redis

from relay.redisio import embedded
from support.child_processes import tied
from support.waiting import free_port, wait_until

SERVICE = "post"
_DOWN_MS = 1000  # until a Sentinel calls a silent server down
_KEPT = {  # what the promise needs, as the product's own Redis has it
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
    "maxmemory-policy": "noeviction",
    "repl-diskless-sync-delay": "0",  # no wait for further replicas
}


class Server:
    """One server or Sentinel on a loopback port; its folder outlives ``kill``."""

    def __init__(self, directory: Path, *, sentinel: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.sentinel = sentinel
        self.process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://{self.address}/0"

    def client(self) -> redis.Redis:
        """Return a new client; it is up to the caller to close it."""
        return redis.Redis.from_url(self.url, socket_timeout=5, decode_responses=True)

    def configure(self, *lines: str) -> None:
        """Write its configuration, which it rewrites itself at a failover."""
        text = [f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}", f"logfile {self.directory}/log", *lines]
        (self.directory / "conf").write_text("\n".join(text) + "\n")

    def start(self) -> Server:
        words = [str(embedded.find_server()), str(self.directory / "conf"), *(["--sentinel"] if self.sentinel else [])]
        self.process = subprocess.Popen(tied(words), stdout=subprocess.DEVNULL, process_group=0)
        wait_until(self._answers, message=lambda: (self.directory / "log").read_text()[-2000:])
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    kill = stop  # as a power cut would

    def pause(self) -> None:
        """Let it hang: connections are accepted by the kernel, nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def replication(self) -> dict[str, object]:
        """Return what it says of its role and its replicas; nothing when it does not answer."""
        try:
            with self.client() as client:
                return dict(client.info("replication"))
        except redis.RedisError:  # away, or just demoted: a Sentinel has it close all connections then
            return {}

    def _answers(self) -> bool:
        try:
            with self.client() as client:  # who answers may be another's, on a port that both were given
                return self.process is not None and client.info("server")["process_id"] == self.process.pid
        except redis.RedisError:
            return False


def _watching(master: Server) -> list[str]:
    return [
        f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 2",
        f"sentinel down-after-milliseconds {SERVICE} {_DOWN_MS}",
        f"sentinel failover-timeout {SERVICE} 6000",
    ]


class SentinelSet:
    """Two servers and three Sentinels. ``master`` and ``replica`` are who they are now."""

    def __init__(self, directory: Path, **options: str) -> None:
        self.servers = [Server(directory / f"server-{n}") for n in range(2)]
        self.sentinels = [Server(directory / f"sentinel-{n}", sentinel=True) for n in range(3)]
        kept = [f'{name} "{value}"' for name, value in {**_KEPT, **options}.items()]
        first, second = self.servers
        first.configure(*kept)
        second.configure(*kept, f"replicaof 127.0.0.1 {first.port}")
        # As after a restart they know each other and the replica: to find them takes 8 s, and more on a busy machine.
        names = {sentinel: secrets.token_hex(20) for sentinel in self.sentinels}
        for sentinel in self.sentinels:
            sentinel.configure(
                f"sentinel myid {names[sentinel]}",
                *_watching(first),
                f"sentinel known-replica {SERVICE} 127.0.0.1 {second.port}",
                *(
                    f"sentinel known-sentinel {SERVICE} 127.0.0.1 {other.port} {name}"
                    for other, name in names.items()
                    if other is not sentinel
                ),
            )

    def start(self) -> SentinelSet:
        for server in self.servers:
            server.start()
        self.wait_in_step()
        for sentinel in self.sentinels:
            sentinel.start()
        self.wait_watched()
        return self

    def stop(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.stop()

    @property
    def settings(self) -> dict[str, str]:
        return {"redis.sentinels": ",".join(s.address for s in self.sentinels), "redis.service": SERVICE}

    @property
    def master(self) -> Server:
        """The master by the word of the first Sentinel that answers."""
        for sentinel in self.sentinels:
            try:
                with sentinel.client() as client:
                    port = int(client.sentinel_master(SERVICE)["port"])
                return next(s for s in self.servers if s.port == port)
            except redis.RedisError:
                continue
        raise AssertionError("no Sentinel answers")

    @property
    def replica(self) -> Server:
        master = self.master
        return next(s for s in self.servers if s is not master)

    def name_master(self, new: Server) -> None:
        """Have the Sentinels watch another server, as an operator does who has exchanged the two by hand.

        By themselves they see it after 25 s.
        """
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                client.sentinel_remove(SERVICE)
                client.sentinel_monitor(SERVICE, "127.0.0.1", new.port, 2)

    def wait_in_step(self) -> None:
        """Wait until one follows the other."""

        def in_step() -> bool:
            masters = [found for s in self.servers if (found := s.replication()).get("role") == "master"]
            return len(masters) == 1 and "online" in str(masters[0].get("slave0"))

        wait_until(in_step, 60, "no replica in step")

    def wait_watched(self) -> None:
        """Wait until every Sentinel knows the others and the replica, so that a failover can be."""

        def known() -> list[tuple[int, int, str]]:
            states = []
            for sentinel in self.sentinels:
                with sentinel.client() as client:
                    state = client.sentinel_master(SERVICE)
                states.append((state["num-other-sentinels"], state["num-slaves"], state["flags"]))
            return states

        def watched() -> bool:
            return all(others == len(self.sentinels) - 1 and replicas for others, replicas, _ in known())

        # They hear of each other every 2 s, but only where they find the master up: on a machine that stalls for a
        # second they do not, and begin again some 15 s later.
        wait_until(watched, 120, lambda: f"Sentinels that do not know others (others, replicas, master): {known()}")

    def wait_failover(self, old: Server) -> Server:
        """Wait until another server is the master for every Sentinel, and return it."""

        def all_know() -> Server | None:
            known = set()
            for sentinel in self.sentinels:
                with sentinel.client() as client:
                    known.add(int(client.sentinel_master(SERVICE)["port"]))
            if len(known) == 1 and old.port not in known:
                return next(s for s in self.servers if s.port in known)
            return None

        new = wait_until(all_know, 60, lambda: f"no failover from {old.address}", 0.05)
        assert new is not None
        wait_until(lambda: new.replication().get("role") == "master", 60)
        return new
