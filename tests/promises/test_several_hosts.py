"""Several hosts on one Redis that wants a user and TLS, each in namespaces of its own; some die under load."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from relay.config import loader
from relay.ledger import keys
from relay.topology import decisions, followers, promotion
from support import hosts
from support.child_processes import tied
from support.dialogue import Dialogue
from support.hosts import Host, Network
from support.recorded_sessions import Transaction
from support.retrying_sender import Sender, message
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

# What the page gives the user of smtp-dup, and nothing more.
PAGE = Path(__file__).parents[2] / "docs" / "hosts.md"
(RIGHTS,) = re.findall(r"^user smtp-dup on >secret (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)


@dataclass
class Redis:
    """A Redis with TLS only, whose one user but the test's has a password."""

    directory: Path
    address: str
    port: int

    @property
    def url(self) -> str:
        return (
            f"rediss://copies:hunter2@{self.address}:{self.port}/0"
            f"?ssl_ca_certs={self.directory}/ca.pem&ssl_check_hostname=true"
        )

    def client(self) -> redis.Redis:
        """Return a client that may do everything."""
        return redis.Redis(
            host=self.address, port=self.port, password="root", ssl=True, ssl_ca_certs=f"{self.directory}/ca.pem"
        )


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if reason := hosts.unavailable():
        pytest.skip(reason)
    with Network(tmp_path / "hosts") as made:
        yield made


@pytest.fixture
def tls_redis(tmp_path: Path, network: Network) -> Iterator[Redis]:
    """A redis-server of the system's: the embedded one has no TLS."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("needs a redis-server with TLS, as Debian's")
    folder = tmp_path / "redis"
    folder.mkdir()
    made = Redis(folder, network.apart, free_port())
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=redis", "-addext", f"subjectAltName=IP:{network.apart}"),
            *("-out", f"{folder}/ca.pem", "-keyout", f"{folder}/key.pem"),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "conf").write_text(
        f"bind {network.apart}\nport 0\ntls-port {made.port}\ntls-auth-clients no\ndir {folder}\nlogfile {folder}/log\n"
        f"tls-cert-file {folder}/ca.pem\ntls-key-file {folder}/key.pem\ntls-ca-cert-file {folder}/ca.pem\n"
        'save ""\nappendonly yes\nappendfsync always\nmaxmemory-policy noeviction\n'
        f"user default on >root ~* &* +@all\nuser copies on >hunter2 {RIGHTS}\n"
    )
    process = subprocess.Popen(tied([program, f"{folder}/conf"]), process_group=0)
    try:
        with made.client() as client:
            wait_until(lambda: _answers(client), message=(folder / "log").read_text)
        yield made
    finally:
        process.kill()
        process.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


@pytest.fixture
def servers(network: Network) -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    """A primary and a backup that every host can reach."""
    with ExitStack() as ends:
        made = []
        for _ in range(2):
            server = ScriptedServer()
            server.host = network.here
            made.append(ends.enter_context(server))
        yield made[0], made[1]


class Site:
    """Three relay hosts and two worker hosts, each with its own sender or none."""

    def __init__(self, network: Network, url: str, primary: ScriptedServer, backup: ScriptedServer) -> None:
        self.hosts = network.hosts
        self.primary, self.backup = primary, backup
        settings = {"redis.url": url, "retry.first": "1", "workers.batch": "10"}
        for name in ("relay-0", "relay-1", "relay-2", "courier-0", "courier-1"):
            command = "relay" if name.startswith("relay") else "workers"
            made = network.host(name, command, primary=primary.address, backups=[backup.address], settings=settings)
            made.start(wait=False)
        for host in self.hosts:
            host.wait_ready()
        self.relays, self.workers = self.hosts[:3], self.hosts[3:]
        self.senders = [
            Sender(r.smtp_port, range(n * 1_000_000, (n + 1) * 1_000_000), sessions=2, patience=120, host=r.host)
            for n, r in enumerate(self.relays)
        ]

    def accepted(self) -> set[int]:
        return set[int]().union(*(sender.accepted for sender in self.senders))

    def delivered(self) -> set[int]:
        return _numbers(self.backup)

    def begin(self) -> None:
        """Send mail to every relay host, and see that it arrives."""
        for sender in self.senders:
            sender.start()
        all_send = lambda: all(len(s.accepted) > 100 for s in self.senders)  # noqa: E731 - short
        wait_until(lambda: all_send() and len(self.delivered()) > 100, 60, "no mail goes on")

    def end(self) -> None:
        """Send some more mail, then none."""
        before = len(self.accepted())
        wait_until(lambda: len(self.accepted()) > before + 200, 60, "the other hosts' mail has stopped")
        for sender in self.senders:
            sender.stop()
        for sender in self.senders:
            sender.join()

    def audit(self) -> None:
        """Whatever was accepted arrives at the backup, and is at the primary; what came twice has its line in a log."""

        def missing() -> set[int]:
            return self.accepted() - self.delivered()

        wait_until(lambda: not missing(), 90, lambda: f"not at the backup: {sorted(missing())[:20]}", 0.5)
        assert not self.accepted() - _numbers(self.primary)
        ids = Counter(_id(t) for t in self.backup.messages)
        events = [e for host in self.hosts for e in host.events]
        explained = {e.get("id") for e in events if e["event"] in {"may repeat", "uncertain", "uncertain copied"}}
        assert not {i for i, count in ids.items() if count > 1} - explained


def _numbers(server: ScriptedServer) -> set[int]:
    return {int(t.header("Subject") or -1) for t in server.messages}


def _id(transaction: Transaction) -> str:
    found = re.search(rb"\bid ([\w.-]+)", transaction.trace)
    assert found, transaction.trace
    return found[1].decode()


def let_minutes_pass(client: redis.Redis, dead: str) -> None:
    """Have in Redis what minutes after the death of a worker host are there: neither its life signs nor its leases."""
    for key in client.scan_iter(f"rq:worker:{dead}.*"):
        client.delete(key)
    for key in client.scan_iter(keys.BUSY + "*"):
        for message_id in client.zrange(key, 0, -1):
            client.zadd(key, {message_id: 1}, xx=True)
    if (client.get(keys.RECONCILER) or b"").startswith(dead.encode()):
        client.delete(keys.RECONCILER)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_hosts_share_the_work_and_the_death_of_some_loses_nothing(
    network: Network, tls_redis: Redis, servers: tuple[ScriptedServer, ScriptedServer]
) -> None:
    """Of three relay hosts and two worker hosts one each dies under load: nothing is lost, repeats are explained.

    Only the reconciler, which is one, touches what another host's worker has in hand, and any host lists everything.
    """
    site = Site(network, tls_redis.url, *servers)
    site.begin()
    courier_0, courier_1 = site.workers
    with tls_redis.client() as client:
        at_work = {key.removeprefix(b"rq:worker:").partition(b".")[0] for key in client.smembers("rq:workers")}
        assert at_work == {b"courier-0", b"courier-1"}
        holder = wait_until(lambda: client.get(keys.RECONCILER), 30, "no reconciler").decode()
        assert re.fullmatch(r"courier-[01] /\S+", holder), holder
        courier_1.child(f"worker-{site.backup.address}-1").kill()
        courier_1.wait_for_log("starting it again")  # its own supervisor sees to what it had
        courier_0.die()
        site.relays[0].die()
        site.end()
        assert "courier-0" not in courier_1.log
        let_minutes_pass(client, "courier-0")
    site.relays[1].run("queue", "verify", timeout=60)
    site.audit()
    wait_until(lambda: site.relays[1].summary()["pending"] == 0, 30, "copies stay pending", 0.5)
    assert site.relays[2].summary() == courier_1.summary()
    for host in (*site.relays[1:], courier_1):
        assert host.stop() == 0


@pytest.mark.timeout(200)
def test_the_body_that_another_host_has_moved_to_its_disk(
    network: Network, tls_redis: Redis, servers: tuple[ScriptedServer, ScriptedServer]
) -> None:
    """A retry elsewhere fails again and says where the body is; on its host it brings the body back for all workers."""
    primary, backup = servers
    backup.replies["."] = "554 5.7.1 never"
    settings = {"redis.url": tls_redis.url, "failed.max_bytes": "0"}
    relay, courier, other = (
        network.host(name, command, primary=primary.address, backups=[backup.address], settings=settings)
        for name, command in (("relay-0", "relay"), ("courier-0", "workers"), ("courier-1", "workers"))
    )
    relay.start()
    courier.start()
    with Dialogue(relay.smtp_port, relay.host) as client:
        client.hello()
        client.mail("a@example.com", "b@example.com", data=b"Subject: 7\r\n\r\n" + b"x" * 5000 + b"\r\n")
    wait_until(lambda: relay.summary()["failed"] == 1, 30, "not failed")
    # The reconciler of the one worker host that there is moves the body.
    wait_until(lambda: list((courier.state_dir / "failed").glob("*")), 100, "the body was not moved", 0.5)
    (row,) = relay.json("failed", "list")
    backup.replies.clear()
    assert courier.stop() == 0
    other.start()
    assert other.run("failed", "retry", row["id"]).returncode == 0

    def refused() -> bool:
        return "run failed retry there" in other.run("failed", "show", row["id"]).stdout

    wait_until(refused, 30, lambda: other.log[-3000:], 0.5)
    assert "courier-0" in other.run("failed", "show", row["id"]).stdout
    assert not backup.messages
    assert courier.run("failed", "retry", row["id"]).returncode == 0
    wait_until(lambda: 7 in _numbers(backup), 30, "the copy was not delivered")


@pytest.mark.timeout(200)
def test_a_promotion_while_a_relay_host_is_cut_off_from_redis(network: Network, tls_redis: Redis) -> None:
    """Its mail goes to the former primary, spooled for the new one; it is told as late, and follows when it can."""
    with ExitStack() as ends:
        old, new = ScriptedServer(), ScriptedServer()
        for server in (old, new):
            server.host = network.here
            ends.enter_context(server)
        settings = {"redis.url": tls_redis.url, "redis.timeout_seconds": "2"}
        hosts = [
            network.host(
                name, command, primary=f"old={old.address}", backups=[f"new={new.address}"], settings=settings
            ).start()
            for name, command in (("relay-0", "relay"), ("relay-1", "relay"), ("courier-0", "workers"))
        ]
        near, cut, _ = hosts

        def send(host: Host, number: int) -> None:
            with Dialogue(host.smtp_port, host.host) as client:
                client.hello()
                client.mail("a@example.com", "b@example.com", data=message(number))

        client = ends.enter_context(tls_redis.client())
        wait_until(lambda: len(decisions.view(client).living) == 2)
        plan = promotion.plan(client, loader.load(environ=near.environment, directories=()), "new")
        cut.cut_off(network.apart)
        promotion.commit(client, plan, "", {}, None)
        found = followers.follow(client, plan, 4, lambda _: None)
        assert [beat.host for beat in found.late] == ["relay-1"]
        send(cut, 1)
        send(near, 2)
        assert (_numbers(old) - {2}, _numbers(new)) == ({1}, {2})
        cut.reach(network.apart)
        wait_until(lambda: len([b for b in decisions.view(client).living if b.epoch == 1]) == 2, 60)
        send(cut, 3)
        assert 3 in _numbers(new)
        for server in (old, new):
            wait_until(lambda server=server: _numbers(server) == {1, 2, 3}, 60, "not at both")
        assert not any(beat.trouble for beat in decisions.view(client).living)
