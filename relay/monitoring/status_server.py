"""Status over HTTP, a task of the housekeeping process: /healthz, /readyz and /metrics.

/healthz says that this process lives and no relay dies in a loop, /readyz whether mail can be taken and kept (200, or
503 with the reasons),
/metrics what the processes counted and what ledger and spool hold at that moment. A Redis that is away is a
warning in /readyz where a spool keeps the copies, else a reason, and takes only the ledger's numbers from /metrics.
A request has a bounded head and a deadline, and at most so many are served at once: for one more, the one that has been
silent for longest is hung up on.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from loguru import logger
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from relay import limits
from relay.config.model import RedisSettings, Settings
from relay.ledger import archive, changes, divergence_groups, overview
from relay.ledger.continuity import warning
from relay.ledger.divergence_groups import Numbers
from relay.ledger.monitor import STOP_AT
from relay.metric_store import Arena
from relay.monitoring import divergence_metrics, topology
from relay.monitoring.probes import ProbeResult, probe_redis
from relay.monitoring.readiness_metrics import ReadinessCollector
from relay.redisio.clients import sync_client
from relay.smtpd.shared_counters import ProcessCounters
from relay.spool import writer
from relay.topology import decisions
from relay.topology.decisions import View

_HEAD_LIMIT = 8192  # octets of request line and headers
_SECONDS = 5.0  # for a request's head, and for each write of the answer
_AT_ONCE = 32
_SHARED_SECONDS = 1.0
_LINGER_SECONDS = 1.0  # after an answer, for whatever else the client has sent
_LINGER_OCTETS = 65536
_LOOK_EVERY = 0.25  # seconds between two looks whether to stop
_FINISH_EVERY = 0.02  # and between two looks whether all have their answers
_PORT_SECONDS = 3.0  # for a greeting on the relay's port
_SPOOL = "spool"
_HELD = "destination "
_LEDGER = "ledger"
_MEMORY = "redis memory"
_TOLD_SECONDS = 86400.0  # for so long a ledger that has changed is a warning
_SPOOLED = {"redis", "redis replicas", _MEMORY}  # trouble with these sends copies to the spool
_ABOUT_FAILOVER = ("sentinel ", "replica ")  # mail goes on as long as the master does
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where to reach such a listener)


class HttpAnswer(NamedTuple):
    """What one path answers."""

    status: HTTPStatus
    content_type: str
    body: bytes


Answers = Mapping[str, Callable[[], HttpAnswer]]


class Shared:
    """An answer that all who ask at the same time, or within a second, get from one computation."""

    def __init__(self, find: Callable[[], HttpAnswer]) -> None:
        self._find = find
        self._lock = threading.Lock()  # whoever comes meanwhile waits for what is being found out
        self._found: HttpAnswer | Exception | None = None
        self._at = 0.0

    def __call__(self) -> HttpAnswer:
        with self._lock:
            if self._found is None or time.monotonic() - self._at >= _SHARED_SECONDS:
                try:
                    self._found = self._find()
                except Exception as error:
                    self._found = error
                self._at = time.monotonic()
            found = self._found
        if isinstance(found, Exception):
            raise found
        return found


def bind(settings: Settings) -> socket.socket | None:
    """Bind the address of the status server; None when it is off. Raises OSError with the address in its text."""
    if settings.status.address is None:
        return None
    host, port = settings.status.address
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno not in {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}:  # IPv6 is there, but disabled
                    raise
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        # create_server repeats the address in its text.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(f"status.listen: cannot listen on {settings.status.listen}: {reason}") from error


def serve(
    settings: Settings,
    listener: socket.socket,
    redis_url: str,
    arena: Arena | None,
    stop: threading.Event,
    *,
    seat: ProcessCounters | None = None,
    failing: Callable[[], list[str]] = list,
) -> None:
    """Answer until ``stop``. With a relay's ``seat`` its port is watched too; ``failing`` names who dies in a loop."""
    server = settings.redis.at(redis_url)
    verdicts = ReadinessCollector(replace(settings, redis=server))
    collectors = [LedgerCollector(server), verdicts, *_relay_collectors(settings, seat)]
    answers = {
        "/healthz": Shared(lambda: healthy(failing())),
        "/readyz": Shared(lambda: ready(readiness(settings, redis_url, relaying=seat is not None))),
        "/metrics": Shared(lambda: metrics(arena, *collectors)),
    }
    with StatusServer(listener, answers) as http:
        while not stop.is_set():
            http.handle_request()  # or nothing, for a while
        http.finish()


def healthy(failing: Sequence[str]) -> HttpAnswer:
    """Return the answer of /healthz: 503 while processes die again and again."""
    if not failing:
        return HttpAnswer(HTTPStatus.OK, "text/plain; charset=utf-8", b"ok\n")
    text = f"{', '.join(failing)}: ended again and again, soon after the start; the log says how\n"
    return HttpAnswer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", text.encode())


# /readyz ------------------------------------------------------------------------------------------------------


def readiness(settings: Settings, redis_url: str, *, relaying: bool) -> list[ProbeResult]:
    """Look at all that taking a message and keeping its copies needs, now."""
    findings = asyncio.run(probe_redis(settings, redis_url))
    if all(finding.ok for finding in findings):
        findings += _memory(settings, redis_url)
    findings += _ledger(settings.redis.at(redis_url))
    findings += topology.find(settings, settings.redis.at(redis_url))
    findings += _held(settings.redis.at(redis_url))
    if relaying:
        patience = _PORT_SECONDS + settings.smtp.greeting_delay
        first = b"PROXY UNKNOWN\r\n" if settings.smtp.proxy_protocol else b""
        findings += [_port(host, port, patience, first) for host, port in settings.smtp.addresses]
        findings += _spool(settings)
    return findings


def _memory(settings: Settings, redis_url: str) -> list[ProbeResult]:
    """Say how full Redis is: nothing where it has no bound."""
    try:
        with sync_client(settings.redis.at(redis_url), settings.redis.timeout_seconds, retries=0) as client:
            used, limit = archive.memory(client)
            failed = sum(row.failed for row in overview.summary(client)) if limit else 0
    except (RedisError, OSError) as error:
        return [ProbeResult(_MEMORY, False, f"cannot be asked: {error}")]
    if not limit:
        return []
    text = f"{used / limit:.0%} of maxmemory is used"
    if used <= STOP_AT * limit:
        return [ProbeResult(_MEMORY, True, text)]
    text += ": new copies go to the spool. Raise maxmemory, or let the backups take what waits"
    text += f"; {failed} failed copies: failed retry, failed drop" if failed else ""
    return [ProbeResult(_MEMORY, False, text)]


def ready(findings: list[ProbeResult]) -> HttpAnswer:
    """Return the answer of /readyz: 503 with the reasons as soon as mail cannot be taken and kept.

    A Redis that cannot be used is only a warning beside a spool that can. One that acknowledges what it may lose is
    a reason: nothing goes to the spool then.
    """
    can_spool = any(f.subject == _SPOOL and f.ok for f in findings)
    warnings = [
        f
        for f in findings
        if not f.ok
        and (
            (f.subject in _SPOOLED and can_spool)
            or f.subject in {_LEDGER, topology.SUBJECT}
            or f.subject.startswith(_HELD)
            or f.subject.startswith(_ABOUT_FAILOVER)
        )
    ]
    reasons = [f for f in findings if not f.ok and f not in warnings]
    content = {
        "ready": not reasons,
        "reasons": [f"{f.subject}: {f.text}" for f in reasons],
        "warnings": [f"{f.subject}: {f.text}" for f in warnings],
        "checks": [{"subject": f.subject, "ok": f.ok, "text": f.text} for f in findings],
    }
    body = json.dumps(content, indent=2) + "\n"
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return HttpAnswer(status, "application/json", body.encode())


def _ledger(server: RedisSettings) -> list[ProbeResult]:
    """Say whether the ledger turned out lately to be another than it was; nothing where it does not answer."""
    try:
        with sync_client(server, server.timeout_seconds, retries=0) as client:
            change = overview.change(client)
            ago = changes.now(client) - change.at
    except (RedisError, OSError):
        return []
    if not change.cause or ago > _TOLD_SECONDS:
        return [ProbeResult(_LEDGER, True, "is the one that was here before")]
    return [ProbeResult(_LEDGER, False, f"{warning(change.cause)} ({ago:.0f} s ago)")]


def _held(server: RedisSettings) -> list[ProbeResult]:
    """Say which destinations an operator holds; nothing where the ledger does not answer."""
    try:
        with sync_client(server, server.timeout_seconds, retries=0) as client:
            rows = overview.summary(client)
    except (RedisError, OSError):
        return []
    return [ProbeResult(f"{_HELD}{row.destination}", False, f"held {row.reason}") for row in rows if row.held]


def _port(host: str, port: int, patience: float, first: bytes = b"") -> ProbeResult:
    """Connect as a client: the kernel alone would take a connection also where no process accepts it any more."""
    subject = f"relay {host or '*'}:{port}"
    try:
        with socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=patience) as client:
            client.settimeout(patience)
            client.sendall(first)
            code = client.recv(512)[:3]
            client.sendall(b"QUIT\r\n")
    except OSError as error:
        return ProbeResult(subject, False, f"does not accept: {error.strerror or error}")
    # Any other reply is a living relay's too: it may be set not to talk to this machine.
    living = code.isdigit() and code != b"421"
    return ProbeResult(
        subject, living, "accepts" if living else f"turns clients away ({code.decode('ascii', 'replace')})"
    )


def _spool(settings: Settings) -> list[ProbeResult]:
    folder = settings.spool.dir
    if folder is None:
        return []
    place = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return [ProbeResult(_SPOOL, False, f"{folder} cannot be written")]
    free = shutil.disk_usage(place).free
    least = settings.spool.min_free
    if free < least:
        return [ProbeResult(_SPOOL, False, f"{free} bytes are free at {folder}, spool.min_free is {least}")]
    return [ProbeResult(_SPOOL, True, f"{folder} can be written")]


# /metrics -----------------------------------------------------------------------------------------------------


def metrics(arena: Arena | None, *others: Collector) -> HttpAnswer:
    """Return the answer of /metrics: the sum over all processes, ended ones too, and what is so at this moment."""
    registry = CollectorRegistry()
    for collector in (arena, *others):
        if collector is not None:
            registry.register(collector)
    return HttpAnswer(HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(registry))


def _relay_collectors(settings: Settings, seat: ProcessCounters | None) -> list[Collector]:
    if seat is None:
        return []
    return [SeatCollector(seat), *([SpoolCollector(settings.spool.dir)] if settings.spool.dir else [])]


class SeatCollector(Collector):
    """What all relay processes hold now."""

    def __init__(self, seat: ProcessCounters) -> None:
        self._seat = seat

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("smtpdup_clients", "Clients connected now", value=self._seat.clients)
        text = "Octets of messages in memory now"
        yield GaugeMetricFamily("smtpdup_in_flight_bytes", text, value=self._seat.octets)


class SpoolCollector(Collector):
    """What waits in this host's spool."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        try:
            found = writer.summary(self._folder)
        except OSError as error:
            logger.warning("the spool cannot be read: {}", error)
            return
        yield GaugeMetricFamily("smtpdup_spool_messages", "Messages in the spool", value=found.messages)
        yield GaugeMetricFamily("smtpdup_spool_bytes", "Octets in the spool", value=found.bytes)
        text = "Age of the message that is in the spool for longest"
        yield GaugeMetricFamily("smtpdup_spool_oldest_seconds", text, value=found.oldest_age_s)
        text = "Files that were set aside because they cannot be read"
        yield GaugeMetricFamily("smtpdup_spool_corrupt", text, value=found.corrupt)
        text = "Files that a crash left half written: nobody was promised anything"
        yield GaugeMetricFamily("smtpdup_spool_unfinished", text, value=found.unfinished)
        text = "Copies in the spool that wait for this backup alone"
        backlogs = GaugeMetricFamily("smtpdup_spool_backlog", text, labels=["destination"])
        for name, count in found.backlogs.items():
            backlogs.add_metric([name], count)
        yield backlogs


class LedgerCollector(Collector):
    """What the ledger says at scrape time, so that no process has to keep count of it."""

    def __init__(self, server: RedisSettings) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        rows, changed_at, seen, divergences = self._read()
        yield GaugeMetricFamily("smtpdup_redis_up", "Whether Redis answered this scrape", value=float(rows is not None))
        if rows is None:
            return  # no sample at all: zero would say that nothing waits
        if seen is not None:
            yield from topology.families(seen)
        gauges: tuple[tuple[str, str, Callable[[overview.Summary], float]], ...] = (
            ("smtpdup_pending", "Copies that wait", lambda r: r.pending),
            ("smtpdup_oldest_pending_seconds", "Age of the copy that waits longest", lambda r: r.oldest_age_s),
            ("smtpdup_retrying", "Copies that wait for another try", lambda r: r.retrying),
            ("smtpdup_failed", "Copies in the failed list", lambda r: r.failed),
            ("smtpdup_paused", "Whether only probes go to this destination", lambda r: r.paused),
            ("smtpdup_held", "Whether an operator holds this destination", lambda r: r.held),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["destination"])
            for row in rows:
                gauge.add_metric([row.destination], float(value(row)))
            yield gauge
        text = "When the ledger last turned out to be empty, older or another one, seconds since the epoch; 0: never"
        yield GaugeMetricFamily("smtpdup_ledger_changed_timestamp_seconds", text, value=changed_at)
        text = "Copies delivered since the ledger began"
        counter = CounterMetricFamily("smtpdup_delivered", text, labels=["destination"])
        for row in rows:
            counter.add_metric([row.destination], row.delivered)
        yield counter
        yield from divergence_metrics.families(divergences)

    def _read(self) -> tuple[list[overview.Summary] | None, float, View | None, dict[str, Numbers]]:
        try:
            with sync_client(self._server, self._server.timeout_seconds, retries=0) as client:
                rows = overview.summary(client)
                found = {row.destination: divergence_groups.numbers(client, row.destination) for row in rows}
                return rows, overview.change(client).at, decisions.view(client), found
        except (RedisError, OSError) as error:
            logger.debug("no numbers from the ledger: {}", error)
            return None, 0.0, None, {}


# HTTP ---------------------------------------------------------------------------------------------------------


class StatusServer(ThreadingHTTPServer):
    """The server on a socket that is already bound."""

    def __init__(self, listener: socket.socket, answers: Answers) -> None:
        super().__init__(listener.getsockname()[:2], _Request, bind_and_activate=False)
        self.socket.close()
        listener.settimeout(_LOOK_EVERY)  # also for accept: a client that has gone again must not keep us there
        self.socket = listener
        self.answers = answers
        self._slots = threading.BoundedSemaphore(_AT_ONCE)
        self._open: dict[Any, bool] = {}  # oldest first; whether an answer is being made
        self._lock = threading.Lock()

    def finish(self) -> None:
        """Let whoever has asked have the answer: another process may be in our place already, and nobody see us go."""
        begun = time.monotonic()
        while (waited := time.monotonic() - begun) < _SECONDS:
            with self._lock:
                are_busy, are_open = any(self._open.values()), bool(self._open)
            if not (are_busy or (are_open and waited < _LOOK_EVERY)):
                break
            time.sleep(_FINISH_EVERY)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if limits.is_own(error) and not isinstance(error, BlockingIOError):
                time.sleep(_LOOK_EVERY)  # no descriptor: whoever waits goes on waiting, and we do not spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve one more. Where there is no place, whoever has been silent for longest makes it."""
        if self._slots.acquire(blocking=False) or (self._hang_up() and self._slots.acquire(timeout=_LOOK_EVERY)):
            with self._lock:
                self._open[request] = False
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread can be had
                self._leave(request)
                raise
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    @contextlib.contextmanager
    def answering(self, request: Any) -> Iterator[None]:
        """While it is answered, this client is not the one that is hung up on, if there is another."""
        with self._lock:
            self._open[request] = True
        try:
            yield
        finally:
            with self._lock:
                self._open[request] = False

    def _leave(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        self._slots.release()

    def _hang_up(self) -> bool:
        with self._lock:
            idle = [request for request, is_busy in self._open.items() if not is_busy]
            request = next(iter(idle or self._open), None)
            if request is not None:
                self._open[request] = True  # once is enough
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread finds the end, and closes
        return request is not None

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002, RUF100
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is nothing to tell
            logger.exception("a request for the status failed")


class _Head(io.RawIOBase):
    """A request's head: so many octets at most, until a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._left = _HEAD_LIMIT
        self._deadline = time.monotonic() + _SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        patience = self._deadline - time.monotonic()
        if patience <= 0 or self._left <= 0:
            raise TimeoutError  # BaseHTTPRequestHandler hangs up
        self._connection.settimeout(patience)
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count


class _Request(BaseHTTPRequestHandler):
    server: StatusServer

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Head(self.connection), 1024)

    def do_GET(self) -> None:
        self._respond(body=True)

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def _respond(self, *, body: bool) -> None:
        self.connection.settimeout(_SECONDS)
        find = self.server.answers.get(re.split(r"[?#]", self.path, maxsplit=1)[0])
        with self.server.answering(self.connection):
            answer = find() if find else HttpAnswer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found\n")
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(answer.body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if body:
                self.wfile.write(answer.body)
        self._linger()

    def _linger(self) -> None:
        """Read on until the client closes: a close with octets unread would reset, and the answer might be lost."""
        deadline = time.monotonic() + _LINGER_SECONDS
        left = _LINGER_OCTETS
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (patience := deadline - time.monotonic()) > 0:
                self.connection.settimeout(patience)
                if not (octets := self.connection.recv(8192)):
                    return
                left -= len(octets)

    def version_string(self) -> str:
        return "smtp-dup"  # http.server would tell Python's version

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the name is http.server's)
        logger.debug("status: {}", format % args)
