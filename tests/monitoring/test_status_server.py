"""Status over HTTP: the answers for monitoring and orchestrators, and the limits on their requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay import metrics
from relay.config.loader import Settings, load
from relay.config.model import RedisSettings
from relay.ledger import changes, divergence_groups, keys, registry
from relay.mail.destination import Destination
from relay.metric_store import Arena
from relay.monitoring import status_server
from relay.monitoring.status_server import LedgerCollector
from relay.smtpd.shared_counters import SharedCounters
from relay.spool import writer
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


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Serve these answers in a thread; gives the port."""
    servers: list[status_server.StatusServer] = []

    def start(answers: status_server.Answers) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        servers.append(status_server.StatusServer(listener, answers))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return int(listener.getsockname()[1])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def alive() -> status_server.HttpAnswer:
    return status_server.HttpAnswer(status_server.HTTPStatus.OK, "text/plain", b"ok\n")


def talk(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def test_known_paths_answer_others_are_404(serve):
    """A path is answered whatever its query; everything else is 404."""
    port = serve({"/healthz": alive})
    assert talk(port, b"GET /healthz HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\nok\n")
    assert b" 200 " in talk(port, b"GET /healthz?x=1 HTTP/1.0\r\n\r\n")
    assert b" 404 " in talk(port, b"GET / HTTP/1.0\r\n\r\n")
    assert b" 404 " in talk(port, b"GET /healthz/../../etc/passwd HTTP/1.0\r\n\r\n")
    assert b" 501 " in talk(port, b"POST /healthz HTTP/1.0\r\n\r\n")


def test_head_has_the_headers_only(serve):
    """HEAD is GET without the body."""
    answer = talk(serve({"/healthz": alive}), b"HEAD /healthz HTTP/1.0\r\n\r\n")
    assert b"Content-Length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_no_version_is_told(serve):
    """Neither Python's version nor ours is in any answer."""
    port = serve({"/healthz": alive})
    for request in (b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /x HTTP/1.0\r\n\r\n", b"NONSENSE\r\n\r\n"):
        assert not re.search(rb"python|basehttp|smtp-dup/", talk(port, request), re.IGNORECASE)


def test_an_endless_head_is_hung_up_on(serve):
    """A head beyond the limit ends the connection; the next client is served."""
    port = serve({"/healthz": alive})
    assert b" 200 " not in try_talk(port, b"GET /healthz HTTP/1.0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n")
    assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")


def test_a_silent_client_is_hung_up_on(serve, monkeypatch):
    """A request that does not come ends the connection after some seconds, also when it trickles."""
    monkeypatch.setattr(status_server, "_SECONDS", 0.3)
    port = serve({"/healthz": alive})
    started = time.monotonic()
    assert talk(port, b"GET /hea") == b""
    assert time.monotonic() - started < 5


def test_so_many_silent_clients_do_not_keep_others_out(serve, monkeypatch):
    """More clients at once than there are places: those beyond are hung up on, and places come back."""
    monkeypatch.setattr(status_server, "_SECONDS", 0.5)
    port = serve({"/healthz": alive})
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(status_server._AT_ONCE + 5)]
    wait_until(lambda: b" 200 " in try_talk(port), message="no place came back")
    for client in held:
        client.close()


def test_silent_clients_never_take_an_answer_away(serve):
    """However many strangers stay silent, half way or done: each question is answered at once."""
    port = serve({"/healthz": alive})
    held = []
    for n in range(5 * status_server._AT_ONCE):
        held.append(socket.create_connection(("127.0.0.1", port)))
        if n % 2:
            held[-1].sendall(b"GET /hea")
        if n % 8 == 0:
            begun = time.monotonic()
            assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
            assert time.monotonic() - begun < status_server._SECONDS / 2
    for client in held:
        client.close()


def test_those_who_ask_at_once_get_one_computation(serve):
    """However many ask while an answer is being found, it is found once; a second later anew."""
    asked, go = threading.Semaphore(0), threading.Event()
    count: list[int] = []

    def find() -> status_server.HttpAnswer:
        count.append(1)
        asked.release()
        assert go.wait(20)
        return alive()

    port = serve({"/metrics": status_server.Shared(find)})
    answers: list[bytes] = []
    request = b"GET /metrics HTTP/1.0\r\n\r\n"
    clients = [threading.Thread(target=lambda: answers.append(talk(port, request))) for _ in range(20)]
    for client in clients:
        client.start()
    assert asked.acquire(timeout=20)
    go.set()
    for client in clients:
        client.join(20)
    assert len(answers) == 20
    assert all(answer.endswith(b"ok\n") for answer in answers)
    assert len(count) == 1
    wait_until(lambda: talk(port, request).endswith(b"ok\n") and len(count) > 1)


def test_what_fails_is_found_out_once_and_then_again():
    """A computation that raises does so for everybody who waited, and is made anew a second later."""
    outcomes: list[Exception | status_server.HttpAnswer] = [ValueError("no"), alive()]

    def find() -> status_server.HttpAnswer:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    shared = status_server.Shared(find)
    for _ in range(3):
        with pytest.raises(ValueError, match="no"):
            shared()
    shared._at -= status_server._SHARED_SECONDS
    assert shared() == alive()


LARGE = status_server.HttpAnswer(status_server.HTTPStatus.OK, "text/plain", b"x" * (8 << 20))


def test_slow_readers_of_a_large_answer_keep_nobody_out(serve, monkeypatch):
    """Clients that take nothing of a large answer: others are answered at once, and their threads end."""
    monkeypatch.setattr(status_server, "_SECONDS", 600.0)  # none of them ends by its deadline
    port = serve({"/metrics": lambda: LARGE, "/healthz": alive})
    with contextlib.ExitStack() as held:
        for _ in range(2 * status_server._AT_ONCE):
            client = held.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
    wait_until(lambda: not [t for t in threading.enumerate() if "process_request_thread" in t.name])


def test_strangers_do_not_cut_an_answer_off(serve):
    """Who reads a large answer slowly gets all of it, whoever else connects and stays silent meanwhile."""
    port = serve({"/metrics": lambda: LARGE})
    held = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as reader:
        reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        found = len(reader.recv(1000))
        for _ in range(3 * status_server._AT_ONCE):
            held.append(socket.create_connection(("127.0.0.1", port)))
            found += len(reader.recv(1000))
        while octets := reader.recv(1 << 16):
            found += len(octets)
    assert found > len(LARGE.body)
    for client in held:
        client.close()


def test_a_half_closed_connection_is_answered(serve):
    """A client that closes its side after the question gets the answer."""
    port = serve({"/healthz": alive})
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: client.recv(4096), b"")).endswith(b"ok\n")


@pytest.mark.parametrize("junk", [b"GET /healthz HTTP/1.1\r\n\r\n" * 50, b"\0\xff" * 20_000, b"x"])
def test_what_is_pipelined_behind_a_request_takes_no_answer_away(serve, junk):
    """Whatever a client sends behind its request, the answer to that arrives whole, and the connection ends."""
    port = serve({"/metrics": lambda: LARGE})
    answer = talk(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" + junk)
    assert answer.endswith(LARGE.body)
    assert answer.count(b"HTTP/1.0 200") == 1


def try_talk(port: int, request: bytes = b"GET /healthz HTTP/1.0\r\n\r\n") -> bytes:
    try:
        return talk(port, request)
    except OSError:
        return b""


def test_a_port_in_use_is_one_clear_error(settings):
    """The address and the reason are in the text."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=r"^status.listen: cannot listen on 127.0.0.1:\d+: Address already in use$"):
            status_server.bind(settings(status__listen=f"127.0.0.1:{port}"))


def test_off_binds_nothing(settings):
    """status.listen = off: no server."""
    assert status_server.bind(settings(status__listen="off")) is None


def test_all_interfaces_means_both_families(settings):
    """ ":port" answers on IPv4 and, where there is any, on IPv6."""
    port = free_port()
    with status_server.bind(settings(status__listen=f":{port}")) as listener:
        assert listener.getsockname()[1] == port
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        if socket.has_dualstack_ipv6():
            socket.create_connection(("::1", port), timeout=5).close()


def test_it_ends_when_told_and_leaves_the_port_to_the_next(settings, redis_url, tmp_path):
    """A stop ends it soon, and the socket that the supervisor keeps serves its successor."""
    given = settings()
    first = status_server.bind(given)
    for listener in (first, first.dup()):
        port = listener.getsockname()[1]
        stop = threading.Event()
        serving = threading.Thread(target=status_server.serve, args=(given, listener, redis_url, None, stop))
        serving.start()
        assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
        stop.set()
        serving.join(10)
        assert not serving.is_alive()


# /readyz


def test_ready_when_all_is_well(settings, redis_url):
    """A port that greets, a Redis that keeps its promise, a spool that can be written: 200 and no reasons."""
    answer = status_server.ready(status_server.readiness(settings(), redis_url, relaying=True))
    body = json.loads(answer.body)
    assert (answer.status, body["ready"], body["reasons"]) == (200, True, [])
    assert {check["subject"].split()[0] for check in body["checks"]} == {"redis", "ledger", "relay", "spool"}


def test_every_reason_is_told(settings, redis_factory, tmp_path):
    """A closed port, a Redis that forgets and a spool that is no folder: 503, and all three are named."""
    server = redis_factory(appendfsync="everysec")
    (tmp_path / "file").write_text("")
    closed = f"127.0.0.1:{free_port()}"
    given = settings(smtp__listen=closed, spool__dir=str(tmp_path / "file"))
    answer = status_server.ready(status_server.readiness(given, server.url, relaying=True))
    reasons = json.loads(answer.body)["reasons"]
    assert answer.status == 503
    assert any(reason.startswith("redis appendfsync: is everysec") for reason in reasons)
    assert any(reason.startswith(f"relay {closed}: does not accept") for reason in reasons)
    assert any(reason.startswith("spool: ") for reason in reasons)


def test_not_ready_without_redis(settings, tmp_path):
    """A Redis that is away is a reason, and takes no longer than its time-out."""
    answer = status_server.ready(status_server.readiness(settings(), f"unix://{tmp_path}/none.sock", relaying=False))
    assert answer.status == 503
    assert json.loads(answer.body)["reasons"][0].startswith("redis: ")


def test_a_redis_that_is_away_is_a_warning_beside_a_spool(settings, tmp_path):
    """The spool keeps the copies, so mail is still to be sent to this relay."""
    answer = status_server.ready(status_server.readiness(settings(), f"unix://{tmp_path}/none.sock", relaying=True))
    body = json.loads(answer.body)
    assert (answer.status, body["ready"]) == (200, True)
    assert body["warnings"][0].startswith("redis: ")


def test_a_full_relay_is_not_ready(settings, scripted, redis_url):
    """A relay that turns clients away for now does not accept."""
    full = scripted({"CONNECT": ("421 4.3.2 too many clients", Close())})
    findings = status_server.readiness(settings(smtp__listen=full.address), redis_url, relaying=True)
    assert [f.text for f in findings if f.subject.startswith("relay")] == ["turns clients away (421)"]


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
    text = status_server.metrics(arena, LedgerCollector(RedisSettings(redis_url, 5))).body.decode()
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
    text = status_server.metrics(arena).body.decode()
    assert "smtpdup_connections_total 2.0" in text
    assert "smtpdup_metrics_unreadable 1.0" in text
    in_processes(arena, "relay-1")
    assert "smtpdup_connections_total 4.0" in status_server.metrics(arena).body.decode()


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
    assert status_server.metrics(arena).status == 200


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
    counters = SharedCounters(2)
    for n in range(2):
        counters.of_process(n).add_client(3)
        counters.of_process(n).add_octets(1000)
    text = status_server.metrics(None, status_server.SeatCollector(counters.of_process(0))).body.decode()
    assert "smtpdup_clients 6.0" in text
    assert "smtpdup_in_flight_bytes 2000.0" in text


def test_metrics_tell_what_is_in_the_spool(tmp_path):
    """Files that wait and files set aside; a spool that was never used is empty."""
    folder = tmp_path / "spool"
    collector = status_server.SpoolCollector(folder)
    assert "smtpdup_spool_messages 0.0" in status_server.metrics(None, collector).body.decode()
    writer.prepare(folder)
    (writer.messages(folder) / "0000000000000000-100.ready").write_bytes(b"x" * 100)
    (folder / "corrupt" / "x").write_bytes(b"x")
    text = status_server.metrics(None, collector).body.decode()
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
        for line in status_server.metrics(None, LedgerCollector(RedisSettings(redis_url, 5))).body.decode().splitlines()
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
    divergence_groups.acknowledge(redis_client, backup.groups()["second"], "alice", "known", 600)
    text = status_server.metrics(None, LedgerCollector(RedisSettings(redis_url, 5))).body.decode()
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
    text = status_server.metrics(None, LedgerCollector(RedisSettings(f"unix://{tmp_path}/none.sock", 1))).body.decode()
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
