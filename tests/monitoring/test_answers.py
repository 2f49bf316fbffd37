"""What /healthz, /readyz and /metrics answer, and where they are asked."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from relay import metrics
from relay.config.loader import Settings, load
from relay.config.model import RedisSettings
from relay.ledger import changes, divergence_upkeep, keys, registry
from relay.mail.destination import Destination
from relay.metric_store import Arena
from relay.monitoring import answers, findings, listener, topology
from relay.monitoring.collectors import LedgerCollector, SeatCollector, SpoolCollector
from relay.smtpd.shared_counters import ProcessCounters
from relay.spool import writer
from relay.topology.agreement import behind_with_moves
from relay.topology.decisions import View
from relay.topology.heartbeats import UNSAVED, Heartbeat
from relay.topology.moved import MapState
from relay.topology.state import Decision, Topology
from support.diverged_copies import Backup, deferred, refused
from support.ledger_contents import Contents
from support.reactions import Close
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until


@pytest.fixture
def settings(tmp_path: Path, primary: ScriptedServer) -> Callable[..., Settings]:
    """Call it for settings whose status port is free; keys with __ for the dot."""

    def make(**values: str) -> Settings:
        flags = {
            "relay.destination_primary": "primary.example.com:25",
            "status.listen": f"127.0.0.1:{free_port()}",
            "smtp.listen": primary.address,  # something that greets as a relay does
            "spool.min_free": "1M",
            "state_dir": str(tmp_path / "state"),
            **{key.replace("__", "."): value for key, value in values.items()},
        }
        return load(flags, {}, [])

    return make


def test_a_port_in_use_is_one_clear_error(settings):
    """The address and the reason are in the text."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=r"^status.listen: cannot listen on 127.0.0.1:\d+: Address already in use$"):
            listener.bind(settings(status__listen=f"127.0.0.1:{port}"))


def test_off_binds_nothing(settings):
    """status.listen = off: no server."""
    assert listener.bind(settings(status__listen="off")) is None


def test_all_interfaces_means_both_families(settings):
    """ ":port" answers on IPv4 and, where there is any, on IPv6."""
    port = free_port()
    with listener.bind(settings(status__listen=f":{port}")) as bound:
        assert bound.getsockname()[1] == port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", port), timeout=5).close()


# /readyz


def test_ready_when_all_is_well(settings, redis_url):
    """A port that greets, a Redis that keeps its promise, a spool that can be written: 200 and no reasons."""
    answer = answers.ready(findings.of(settings(redis__url=redis_url), relaying=True))
    body = json.loads(answer.body)
    assert (answer.status, body["ready"], body["reasons"]) == (200, True, [])
    assert {check["subject"].split()[0] for check in body["checks"]} == {"redis", "ledger", "relay", "spool"}


def test_every_reason_is_told(settings, redis_factory, tmp_path):
    """A closed port, a Redis that forgets and a spool that is no folder: 503, and all three are named."""
    server = redis_factory(appendfsync="everysec")
    (tmp_path / "file").write_text("")
    closed = f"127.0.0.1:{free_port()}"
    given = settings(smtp__listen=closed, spool__dir=str(tmp_path / "file"), redis__url=server.url)
    answer = answers.ready(findings.of(given, relaying=True))
    reasons = json.loads(answer.body)["reasons"]
    assert answer.status == 503
    assert any(reason.startswith("redis appendfsync: is everysec") for reason in reasons)
    assert any(reason.startswith(f"relay {closed}: does not accept") for reason in reasons)
    assert any(reason.startswith("spool: ") for reason in reasons)


def test_not_ready_without_redis(settings, tmp_path):
    """A Redis that is away is a reason, and takes no longer than its time-out."""
    answer = answers.ready(findings.of(settings(redis__url=f"unix://{tmp_path}/none.sock"), relaying=False))
    assert answer.status == 503
    assert json.loads(answer.body)["reasons"][0].startswith("redis: ")


@pytest.mark.parametrize("lacks", ["room", "inodes"])
def test_a_spool_without_room_is_named(settings, redis_url, small_disk, lacks):
    """No octet or no inode left on the spool's disk: /readyz says which, before mail finds out."""
    disk = small_disk(1, inodes=20)
    given = settings(redis__url=redis_url, state_dir=str(disk / "state"), spool__min_free="0")
    (disk / "state" / "spool").mkdir(parents=True)

    def said() -> str:
        found = json.loads(answers.ready(findings.of(given, relaying=True)).body)
        return " ".join(found["reasons"] + found["warnings"])

    assert "spool" not in said()
    with suppress(OSError):
        for number in range(20):
            (disk / str(number)).write_bytes(b"x" * (0 if lacks == "inodes" else 100_000))
    assert ("no inode is free" if lacks == "inodes" else "bytes are free at") in said()


def test_a_redis_that_is_away_is_a_warning_beside_a_spool(settings, tmp_path):
    """The spool keeps the copies, so mail is still to be sent to this relay."""
    answer = answers.ready(findings.of(settings(redis__url=f"unix://{tmp_path}/none.sock"), relaying=True))
    body = json.loads(answer.body)
    assert (answer.status, body["ready"]) == (200, True)
    assert body["warnings"][0].startswith("redis: ")


@pytest.mark.parametrize("path", ["/readyz", "/metrics"])
def test_a_redis_that_hangs_is_waited_for_twice_at_most(settings, monkeypatch, path):
    """Whoever asks gives an answer ten seconds: it takes connections, and each that is waited for is a time-out."""
    monkeypatch.setattr(answers, "_REDIS_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = settings(redis__timeout_seconds="60")
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        found = answers.of(given, url, None, seat=ProcessCounters.shared_by(1)[0])
        answer = found[path]()
        assert answer.status == 200
        assert b"does not answer within 0.2 s" in answer.body or b"smtpdup_redis_up 0.0" in answer.body
        silent.settimeout(0)
        waits = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                waits += 1
    assert 1 <= waits <= 2


def test_who_cannot_save_follows_all_the_same():
    """A process that goes by the map of who has moved, and cannot write its copy, follows; that is told beside it."""
    beat = Heartbeat("p", "host", "relay-1", 1, "0.1.0", 0, "", 1, "", "", 0, 0.0, 0.0, moved=7)
    unsaved = replace(beat, moved_trouble=f"{UNSAVED}: No space left on device")
    seen = View(None, None, (beat, unsaved), 0.0, moves=MapState(7))
    assert all(map(seen.goes_by_moves, seen.beats))
    assert not seen.goes_by_moves(replace(unsaved, moved=6))
    assert not seen.goes_by_moves(replace(beat, moved_trouble="its settings do not name third"))
    assert any("No space left" in text for text in behind_with_moves(seen))


def test_who_answers_and_who_does_not_follow_is_never_a_reason(settings):
    """Mail is taken and kept while a process, an entry or a decision is behind or damaged: 200, and a warning."""
    beat = Heartbeat("p", "host", "relay-1", 1, "0.1.0", 3, "other", 1, "", "", 0, 0.0, 0.0)
    beats = (
        replace(beat, down=("shop",), moved=1),
        replace(beat, process="q", moved_trouble="its settings do not name third, to which they have moved"),
        replace(beat, process="r", trouble="no"),
    )
    now = Decision(4, "primary")
    seen = View(Topology(now, now), None, beats, 0.0, "no object", MapState(7), "no count")
    found = list(topology.about_topology(settings(), seen))
    troubled = {f.subject for f in found if not f.ok}
    assert troubled >= {topology.SUBJECT, topology.MOVED, f"{topology.FAILOVER}shop"}
    answer = answers.ready(found)
    body = json.loads(answer.body)
    assert (answer.status, body["reasons"]) == (200, [])
    assert len(body["warnings"]) == sum(not f.ok for f in found)


def test_a_full_relay_is_not_ready(settings, scripted, redis_url):
    """A relay that turns clients away for now does not accept."""
    full = scripted({"CONNECT": ("421 4.3.2 too many clients", Close())})
    found = findings.of(settings(smtp__listen=full.address, redis__url=redis_url), relaying=True)
    assert [f.text for f in found if f.subject.startswith("relay")] == ["turns clients away (421)"]


# /metrics


def in_processes(arena: Arena, *names: str) -> None:
    """Count two connections in a process of each name, one after the other."""
    for name in names:
        arena.reserve(name)
        pid = os.fork()
        if pid == 0:
            arena.take(name)
            metrics.connections.inc(2)
            metrics.deliveries.labels("new", "delivered").inc()
            metrics.stage_seconds.observe(0.003)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_metrics_are_the_sum_of_the_processes(redis_url):
    """Counters of every process are added up, ended ones too; who replaces one goes on where it was."""
    arena = Arena()
    in_processes(arena, "relay-1", "relay-2", "relay-2")
    text = answers.metrics(arena, LedgerCollector(RedisSettings(redis_url, 5))).body.decode()
    assert "smtpdup_connections_total 6.0" in text
    assert 'smtpdup_deliveries_total{destination="new",result="delivered"} 3.0' in text
    assert 'smtpdup_stage_seconds_bucket{le="0.005"} 3.0' in text
    assert "smtpdup_stage_seconds_count 3.0" in text
    assert "smtpdup_redis_up 1.0" in text
    assert "smtpdup_metrics_unreadable 0.0" in text


@pytest.mark.parametrize("damage", [b"\xff\xff\xff\xff", b"\x07\0\0\0", b"\x28\0\0\0\0\0\0\0\xff\xff\xff\xff"])
def test_a_process_whose_counters_make_no_sense(damage):
    """It is left out and counted, the others are told, and its successor starts anew."""
    arena = Arena()
    in_processes(arena, "relay-1", "relay-2")
    region = arena._of(0)
    region[: len(damage)] = damage
    text = answers.metrics(arena).body.decode()
    assert "smtpdup_connections_total 2.0" in text
    assert "smtpdup_metrics_unreadable 1.0" in text
    in_processes(arena, "relay-1")
    assert "smtpdup_connections_total 4.0" in answers.metrics(arena).body.decode()


def test_no_room_for_a_metric_costs_nothing_else():
    """More labels than a region holds, more processes than there are regions: what fits is told."""
    arena = Arena(regions=1, size=8192)
    for name in ("relay-1", "relay-2"):
        arena.reserve(name)
        pid = os.fork()
        if pid == 0:
            arena.take(name)
            for n in range(1000):
                metrics.deliveries.labels(f"backup-{n}", "delivered").inc()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    found = answers.metrics(arena)
    assert (found.status, "smtpdup_metrics_full 1.0" in found.body.decode()) == (200, True)


def test_a_hundred_servers_have_their_times():
    """None is missing without a word: there is room for the replies of each, told with the help of the metric."""
    arena = Arena(regions=1)
    arena.reserve("relay-1")
    pid = os.fork()
    if pid == 0:
        arena.take("relay-1")
        for n in range(100):
            metrics.server_seconds.labels(f"server-of-customer-{n}").observe(0.01)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = answers.metrics(arena).body.decode()
    # This process may have timed others in other tests.
    assert len(re.findall(r'smtpdup_server_seconds_count\{[^}]*"server-of-customer-\d+"', text)) == 100
    assert "# HELP smtpdup_server_seconds Time from the held dot" in text
    assert "smtpdup_metrics_full 0.0" in text


def test_a_full_disk_ends_no_process_for_its_metrics(product, primary, backup, redis_url, small_disk):
    """With the state folder's disk full and Redis well, mail goes through and no process dies."""
    disk = small_disk(4)
    settings = {"state_dir": str(disk / "state"), "spool.min_free": "1", "smtp.processes": "2"}
    running = product(primary=primary.address, backups=[backup.address], redis_url=redis_url, settings=settings)
    with (disk / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            pass
    running.child("relay-1").kill()
    for _ in range(30):
        wait_until(lambda: try_send(running))
    backup.wait_for(30)
    assert running.metric("smtpdup_messages_total", result="accepted") == 30
    assert not re.search(r"SIGBUS|status 1", running.log)
    assert not (disk / "state" / "metrics").exists()


def test_a_limit_of_file_size_ends_no_process(product, primary, backup, redis_url):
    """The same where no file may grow at all."""
    running = product(primary=primary.address, backups=[backup.address], redis_url=redis_url, start=False)
    argv = running._argv
    running._argv = lambda *words: ["sh", "-c", 'ulimit -f 0; exec "$@" 2>&1 | cat >/dev/null', "sh", *argv(*words)]
    running.start(wait=False)
    running._argv = argv
    wait_until(lambda: try_send(running))
    backup.wait_for(1)
    assert running.metric("smtpdup_messages_total", result="accepted") == 1
    assert running.get("/readyz")[0] in {200, 503}


def try_send(running) -> bool:
    try:
        return running.send("a@example.com", "b@example.com").startswith("250")
    except (OSError, AssertionError):
        return False


def test_metrics_tell_what_the_relay_processes_hold(tmp_path):
    """Clients and octets in memory, over all seats."""
    counters = ProcessCounters.shared_by(2)
    for n in range(2):
        counters[n].add_client(3)
        counters[n].add_octets(1000)
    text = answers.metrics(None, SeatCollector(counters[0])).body.decode()
    assert "smtpdup_clients 6.0" in text
    assert "smtpdup_in_flight_bytes 2000.0" in text


def test_metrics_tell_what_is_in_the_spool(tmp_path):
    """Files that wait and files set aside; a spool that was never used is empty."""
    folder = tmp_path / "spool"
    collector = SpoolCollector(folder)
    assert "smtpdup_spool_messages 0.0" in answers.metrics(None, collector).body.decode()
    writer.prepare(folder)
    (writer.messages(folder) / "0000000000000000-100.ready").write_bytes(b"x" * 100)
    (folder / "corrupt" / "x").write_bytes(b"x")
    text = answers.metrics(None, collector).body.decode()
    assert "smtpdup_spool_messages 1.0" in text
    assert "smtpdup_spool_bytes 100.0" in text
    assert "smtpdup_spool_corrupt 1.0" in text


def test_metrics_tell_what_the_ledger_knows(redis_client, redis_url, tmp_path):
    """Pending, oldest age, failed and paused per destination, at the moment of the scrape."""
    new = Destination("new", "new.example.com", 25)
    with redis_client.pipeline() as pipe:
        registry.register(pipe, [new, Destination("other", "other.example.com", 25)])
        pipe.zadd(keys.PENDING + "new", {"a": changes.now(redis_client) - 100, "b": changes.now(redis_client)})
        pipe.zadd(keys.FAILED + "new", {"c": 1})
        pipe.hset(keys.HEALTH + "new", mapping={"state": "paused"})
        pipe.hset(keys.COUNTERS, "delivered:new", 7)
        pipe.execute()
    samples = dict(
        line.rsplit(" ", 1)
        for line in answers.metrics(None, LedgerCollector(RedisSettings(redis_url, 5))).body.decode().splitlines()
        if line[:1] != "#"
    )
    assert float(samples['smtpdup_pending{destination="new"}']) == 2
    assert float(samples['smtpdup_pending{destination="other"}']) == 0
    assert 100 <= float(samples['smtpdup_oldest_pending_seconds{destination="new"}']) < 130
    assert float(samples['smtpdup_failed{destination="new"}']) == 1
    assert float(samples['smtpdup_paused{destination="new"}']) == 1
    assert float(samples['smtpdup_delivered_total{destination="new"}']) == 7


def test_metrics_tell_of_divergence(redis_client, redis_url):
    """Open recipients by kind, from the start as zero; an acknowledged reason is counted apart, and so is noise."""
    contents = Contents(redis_client, "new", "other")
    backup = Backup(contents)
    for text in ("550 first", "550 second"):
        backup.attempt(contents.pending("ann@a.test", "bob@a.test"), dict.fromkeys(range(2), refused(text)))
    noisy = contents.pending("ann@a.test")
    backup.attempt(noisy, {0: deferred()})
    backup.attempt(noisy, {})
    divergence_upkeep.acknowledge(redis_client, backup.groups()["second"], "alice", "known", 600)
    text = answers.metrics(None, LedgerCollector(RedisSettings(redis_url, 5))).body.decode()
    for line in (
        'open{destination="new",kind="refused"} 2.0',
        'open{destination="new",kind="deferred"} 0.0',
        'open{destination="other",kind="given-up"} 0.0',
        'reasons{destination="new"} 3.0',
        'acknowledged{destination="new"} 1.0',
        'noise{destination="new"} 1.0',
    ):
        assert "smtpdup_divergence_" + line in text


def test_without_redis_the_other_metrics_stay(tmp_path):
    """A Redis that is away shows as down, and nothing says that no copy waits."""
    text = answers.metrics(None, LedgerCollector(RedisSettings(f"unix://{tmp_path}/none.sock", 1))).body.decode()
    assert "smtpdup_redis_up 0.0" in text
    assert "smtpdup_pending" not in text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_the_product_serves_it(product, primary, backup, path):
    """`smtp-dup up` answers all three on status.listen."""
    running = product(primary=primary.address, backups=[backup.address])
    code, text = running.get(path)
    assert code == 200, text


def test_housekeeping_answers_again_after_its_end(product, primary, backup):
    """The process that answers is started again when it dies, and clients only wait."""
    running = product(primary=primary.address, backups=[backup.address])
    dead = running.child("housekeeping")
    dead.kill()
    wait_until(lambda: running.child("housekeeping").pid != dead.pid)
    assert running.get("/readyz")[0] == 200


def test_product_messages_are_counted(product, primary, backup):
    """One message through shows in the counters of relay, worker and ledger."""
    running = product(primary=primary.address, backups=[backup.address])
    running.send("a@example.com", "b@example.com")
    wait_until(lambda: running.metric("smtpdup_delivered_total") == 1, message=lambda: running.get("/metrics")[1])
    assert running.metric("smtpdup_messages_total", result="accepted") == 1
    assert running.metric("smtpdup_deliveries_total", result="delivered") == 1
    assert running.metric("smtpdup_pending") == 0
    with redis.Redis.from_url(running.redis_url) as client:
        assert client.ping()


def test_a_relay_that_dies_in_a_loop_is_not_healthy(product, primary, backup):
    """Liveness says 503 and who it is while a relay process dies again and again; a worker's death changes nothing."""
    running = product(primary=primary.address, backups=[backup.address])
    dead: set[int] = set()

    def kill(name: str) -> bool:
        child = running.child(name)
        if child.pid not in dead:
            dead.add(child.pid)
            child.kill()
        return len(dead) >= 4

    wait_until(lambda: kill(f"worker-{backup.address}-1"))
    assert running.get("/healthz")[0] == 200
    dead.clear()
    wait_until(lambda: kill("relay-1"))
    wait_until(lambda: running.get("/healthz")[0] == 503)
    assert running.get("/healthz")[1].startswith("relay-1: ")
    wait_until(lambda: running.get("/healthz")[0] == 200)
