"""The HTTP server: the limits on requests, and that nobody takes the health paths away."""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import pytest
from starlette.types import ASGIApp

from relay.monitoring.answers import HttpAnswer
from relay.page import application, connection
from relay.page.application import Front, Shared
from relay.page.server import PageServer
from support.raw_http import talk, try_talk
from support.waiting import wait_until

Answers = Mapping[str, Callable[[], HttpAnswer]]
MakePage = Callable[[], ASGIApp]


@pytest.fixture
def serve() -> Iterator[Callable[..., int]]:
    """Serve these answers in a thread; gives the port."""
    with contextlib.ExitStack() as ends:

        def start(answers: Answers, page: ASGIApp | None = None, make_page: MakePage | None = None) -> int:
            listener = socket.create_server(("127.0.0.1", 0))
            stop = threading.Event()
            front = Front(answers, (lambda: page) if page else make_page)
            thread = threading.Thread(target=PageServer(front, stop).run, args=([listener],))
            port = int(listener.getsockname()[1])
            thread.start()
            ends.callback(front.close)
            ends.callback(thread.join)
            ends.callback(stop.set)
            return port

        yield start


def alive() -> HttpAnswer:
    return HttpAnswer(HTTPStatus.OK, "text/plain", b"ok\n")


def test_known_paths_answer_others_are_404(serve):
    """A path is answered whatever its query; everything else is 404."""
    port = serve({"/healthz": alive})
    assert talk(port, b"GET /healthz HTTP/1.1\r\nHost: whatever\r\n\r\n").endswith(b"\r\n\r\nok\n")
    assert b" 200 " in talk(port, b"GET /healthz?x=1 HTTP/1.0\r\n\r\n")
    assert b" 404 " in talk(port, b"GET / HTTP/1.0\r\n\r\n")
    assert b" 404 " in talk(port, b"GET /healthz/../../etc/passwd HTTP/1.0\r\n\r\n")
    assert b" 405 " in talk(port, b"POST /healthz HTTP/1.0\r\n\r\n")


def test_head_has_the_headers_only(serve):
    """HEAD is GET without the body."""
    answer = talk(serve({"/healthz": alive}), b"HEAD /healthz HTTP/1.0\r\n\r\n")
    assert b"content-length: 3\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


def test_no_version_is_told(serve):
    """Neither Python's version nor ours is in any answer."""
    port = serve({"/healthz": alive})
    for request in (b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /x HTTP/1.0\r\n\r\n", b"NONSENSE\r\n\r\n"):
        assert not re.search(rb"python|uvicorn|h11|starlette|smtp-dup/", talk(port, request), re.IGNORECASE)


def test_an_endless_head_is_hung_up_on(serve):
    """A head beyond the limit ends the connection; the next client is served."""
    port = serve({"/healthz": alive})
    assert b" 200 " not in try_talk(port, b"GET /healthz HTTP/1.0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n")
    assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")


def test_a_silent_client_is_hung_up_on(serve, monkeypatch):
    """A request that does not come ends the connection after some seconds, also when it trickles."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    port = serve({"/healthz": alive})
    started = time.monotonic()
    assert talk(port, b"GET /hea") == b""
    assert time.monotonic() - started < 5


def test_so_many_silent_clients_do_not_keep_others_out(serve, monkeypatch):
    """More clients at once than there are places: those beyond are hung up on, and places come back."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.5)
    port = serve({"/healthz": alive})
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(connection.MOST + 5)]
    wait_until(lambda: b" 200 " in try_talk(port), message="no place came back")
    for client in held:
        client.close()


def test_silent_clients_never_take_an_answer_away(serve):
    """However many strangers stay silent, half way or done: each question is answered at once."""
    port = serve({"/healthz": alive})
    held = []
    for n in range(5 * connection.MOST):
        held.append(socket.create_connection(("127.0.0.1", port)))
        if n % 2:
            held[-1].sendall(b"GET /hea")
        if n % 8 == 0:
            begun = time.monotonic()
            assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
            assert time.monotonic() - begun < connection.HEAD_SECONDS / 2
    for client in held:
        client.close()


def test_those_who_ask_at_once_get_one_computation(serve, monkeypatch):
    """However many ask while an answer is being found, it is found once; a second later anew."""
    monkeypatch.setattr(application, "_SHARED_SECONDS", 600.0)
    asked, go = threading.Semaphore(0), threading.Event()
    count: list[int] = []

    def find() -> HttpAnswer:
        count.append(1)
        asked.release()
        assert go.wait(20)
        return alive()

    port = serve({"/metrics": find})
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
    monkeypatch.setattr(application, "_SHARED_SECONDS", 0.0)
    assert talk(port, request).endswith(b"ok\n")
    assert len(count) == 2


async def test_what_fails_is_found_out_once_and_then_again(monkeypatch):
    """A computation that raises does so for everybody who waited, and is made anew a second later."""
    outcomes: list[Exception | HttpAnswer] = [ValueError("no"), alive()]

    def find() -> HttpAnswer:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    with ThreadPoolExecutor(1) as threads:
        shared = Shared(find, threads)
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                await shared.get()
        monkeypatch.setattr(application, "_SHARED_SECONDS", 0.0)
        assert await shared.get() == alive()


LARGE = HttpAnswer(HTTPStatus.OK, "text/plain", b"x" * (8 << 20))


def test_slow_readers_of_a_large_answer_keep_nobody_out(serve, monkeypatch):
    """Clients that take nothing of a large answer: others are answered at once."""
    monkeypatch.setattr(connection, "MOST", 32)
    for name in ("STUCK_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(connection, name, 600.0)  # none of them ends by its deadline
    port = serve({"/metrics": lambda: LARGE, "/healthz": alive})
    with contextlib.ExitStack() as held:
        for _ in range(64):
            client = held.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")


def test_strangers_do_not_cut_an_answer_off(serve, monkeypatch):
    """Who reads a large answer slowly gets all of it, whoever else connects and stays silent meanwhile."""
    monkeypatch.setattr(connection, "MOST", 32)
    port = serve({"/metrics": lambda: LARGE})
    held = []
    with socket.create_connection(("127.0.0.1", port), timeout=20) as reader:
        reader.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        found = len(reader.recv(1000))
        for _ in range(96):
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
    port = serve({"/metrics": lambda: LARGE, "/healthz": alive})
    answer = talk(port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" + junk)
    assert answer.endswith(LARGE.body)
    assert answer.count(b"HTTP/1.1 200") == 1


def test_it_ends_when_told_and_leaves_the_port_to_the_next():
    """A stop ends it soon, and the socket that the supervisor keeps serves its successor."""
    first = socket.create_server(("127.0.0.1", 0))
    for listener in (first.dup(), first):
        port = listener.getsockname()[1]
        stop = threading.Event()
        serving = threading.Thread(target=PageServer(Front({"/healthz": alive}), stop).run, args=([listener],))
        serving.start()
        assert b" 200 " in talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
        stop.set()
        serving.join(10)
        assert not serving.is_alive()


# Behind the health paths


async def page_that_reads(scope, receive, send) -> None:
    """Answer with the length of the body."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length += len(message["body"])
        more = message["more_body"]
    text = f"{scope['method']} {scope['path']} {length}\n".encode()
    headers = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


async def broken_page(scope, receive, send) -> None:
    raise RuntimeError("a secret of the page")


async def page_that_streams(scope, receive, send) -> None:
    """Send an event, and nothing more until the client goes."""
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    while (await receive())["type"] != "http.disconnect":
        pass


def test_a_broken_page_takes_no_health_away(serve):
    """Whatever the page raises, the three paths answer, and nothing of it is told."""
    port = serve({"/healthz": alive}, broken_page)
    for _ in range(3):
        answer = talk(port, b"GET / HTTP/1.0\r\n\r\n")
        assert b" 500 " in answer
        assert b"secret" not in answer
        assert talk(port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")


def test_a_page_that_cannot_be_made(serve):
    """Each request for it hears 500; health is answered."""

    def make_page() -> ASGIApp:
        raise SyntaxError("a template of the page")

    port = serve({"/healthz": alive}, make_page=make_page)
    for _ in range(3):
        assert b" 500 " in talk(port, b"GET / HTTP/1.0\r\n\r\n")
        assert talk(port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")


POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
HIDDEN = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef" + HIDDEN,
        POST + b"Content-Length: +5\r\n\r\nabcde",
        POST + b"Content-Length: -1\r\n\r\nabcde",
        POST + b"Content-Length : 5\r\n\r\nabcde",
        POST + b"X: a\r\n b\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: xchunked\r\n\r\n",
        b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
        b"GET /\rX HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://evil.example/healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)  # fmt: skip
def test_a_request_that_two_servers_could_read_differently(serve, request_bytes):
    """It is refused, the connection ends, and what came behind it is no request."""
    port = serve({"/healthz": alive}, page_that_reads)
    answer = try_talk(port, request_bytes)
    assert not answer or re.match(rb"HTTP/1.1 (400|505) ", answer)
    assert b"ok\n" not in answer


def test_requests_in_a_row_are_answered_in_a_row(serve):
    """A proxy that keeps its connection gets each answer to its question."""
    port = serve({"/healthz": alive}, page_that_reads)
    requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(20))
    answer = talk(port, requests + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    assert re.findall(rb"GET /(\d+) 0", answer) == [b"%d" % n for n in range(20)]
    assert answer.endswith(b"ok\n")


def test_a_body_that_does_not_come(serve, monkeypatch):
    """A form that is promised and not sent, or sent an octet a time, ends the connection; others are answered."""
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)
    port = serve({"/healthz": alive}, page_that_reads)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
        assert talk(port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")
        with contextlib.suppress(OSError):
            while True:
                client.sendall(b"x")
                if select.select([client], [], [], 0.05)[0]:
                    break
        with contextlib.suppress(OSError):
            assert client.recv(100) == b""


def test_a_body_behind_an_answer_has_an_end(serve, monkeypatch):
    """Who goes on sending a body that nobody wants is hung up on."""
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.3)
    port = serve({"/healthz": alive}, broken_page)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client, contextlib.suppress(OSError):
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        begun = time.monotonic()
        while time.monotonic() - begun < 20:
            client.sendall(b"x" * 100)
        pytest.fail("it went on")


def read_until_silent(client: socket.socket) -> bool:
    """Say whether the connection is still open when nothing more comes."""
    try:
        while client.recv(1000):
            pass
    except TimeoutError:
        return True
    return False


def test_a_stream_outlives_the_deadlines(serve, monkeypatch):
    """Events may come for hours; a stop ends the stream all the same."""
    for name in ("HEAD_SECONDS", "BODY_SECONDS", "ANSWER_SECONDS", "STUCK_SECONDS"):
        monkeypatch.setattr(connection, name, 0.3)
    port = serve({"/healthz": alive}, page_that_streams)
    with socket.create_connection(("127.0.0.1", port), timeout=1.5) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in client.recv(1000)
        assert read_until_silent(client)
        assert talk(port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")


def test_a_stream_that_is_not_read_makes_room(serve, monkeypatch):
    """Streams take places, and the oldest gives its own to somebody who asks."""
    monkeypatch.setattr(connection, "MOST", 8)
    port = serve({"/healthz": alive}, page_that_streams)
    with contextlib.ExitStack() as held:
        clients = [held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(8)]
        for client in clients:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(10)
        for _ in range(3):
            assert talk(port, b"GET /healthz HTTP/1.0\r\n\r\n").endswith(b"ok\n")


def test_an_upgrade_is_not_followed(serve):
    """No web socket, no HTTP/2: the request is answered as if nothing had been offered."""
    port = serve({"/healthz": alive})
    for offer in (b"websocket", b"h2c"):
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: %s\r\n\r\n" % offer
        assert talk(port, request).endswith(b"ok\n")
