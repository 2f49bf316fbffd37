"""What is answered over HTTP: the three health paths first, then the page, which is made when somebody first asks.

The health paths know no template, no session and no route; their answers are found in threads of their own, and all who
ask at the same time, or within a second, get one computation. Whatever the page raises ends with this request.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

from loguru import logger
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.monitoring.answers import HttpAnswer
from relay.page.connection import STREAM

_SHARED_SECONDS = 1.0
_PIECE = 1 << 16  # octets of an answer that are written at once
_NOT_FOUND = HttpAnswer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"not found\n")
_NOT_ALLOWED = HttpAnswer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"GET or HEAD\n")
_NO_CHUNKS = HttpAnswer(HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8", b"a body needs its length\n")
_OTHER_VERSION = HttpAnswer(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "text/plain; charset=utf-8", b"HTTP/1.1\n")
_FAILED = HttpAnswer(
    HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", b"this failed; the log of smtp-dup says why\n"
)

Find = Callable[[], HttpAnswer]


class Shared:
    """An answer that all who ask at the same time, or within a second, get from one computation."""

    def __init__(self, find: Find, threads: ThreadPoolExecutor) -> None:
        self._find = find
        self._threads = threads
        self._finding: asyncio.Future[HttpAnswer] | None = None
        self._found_at = 0.0

    async def get(self) -> HttpAnswer:
        """Return the answer; raises what the computation raised."""
        is_old = self._finding is not None and self._finding.done()
        if self._finding is None or (is_old and time.monotonic() - self._found_at >= _SHARED_SECONDS):
            self._found_at = math.inf  # until it is noted, which is a turn of the loop after its end
            self._finding = asyncio.get_running_loop().run_in_executor(self._threads, self._find)
            self._finding.add_done_callback(self._note)
        return await asyncio.shield(self._finding)  # whoever hangs up takes it from nobody else

    def _note(self, found: asyncio.Future[HttpAnswer]) -> None:
        self._found_at = time.monotonic()
        if not found.cancelled():
            found.exception()  # told to those who have waited, if there are any


class Front:
    """The outermost application: health, then the page, and the border at which exceptions end.

    ``make_page`` is called once, in a thread: it takes half a second and 10 MB. None: there is no page.
    """

    def __init__(self, answers: Mapping[str, Find], make_page: Callable[[], ASGIApp] | None = None) -> None:
        self._threads = ThreadPoolExecutor(len(answers) or 1, thread_name_prefix="health")
        self._answers = {path: Shared(find, self._threads) for path, find in answers.items()}
        self._make_page = make_page
        self._page: asyncio.Future[ASGIApp | None] | None = None

    def close(self) -> None:
        """Give the threads back; one that still waits for Redis ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                if _is_stream(message):
                    scope[STREAM] = True
            await send(message)

        try:
            await self._answer(scope, receive, send_noted)
        except ClientDisconnect:
            logger.debug("page: the client went away")
        except Exception:  # the border of the request
            if begun:
                raise  # uvicorn logs it and closes the connection: the answer must not seem to be whole
            logger.exception("a request for the {} failed", "status" if scope["path"] in self._answers else "page")
            await _send(scope, send, _FAILED)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["http_version"] not in {"1.0", "1.1"}:
            await _send(scope, send, _OTHER_VERSION)
        elif any(name == b"transfer-encoding" for name, _ in scope["headers"]):
            await _send(scope, send, _NO_CHUNKS)
        elif shared := self._answers.get(scope["path"]):
            is_asked = scope["method"] in {"GET", "HEAD"}
            await _send(scope, send, await shared.get() if is_asked else _NOT_ALLOWED)
        elif self._make_page:
            page = await self._made(self._make_page)
            await (page(scope, receive, send) if page else _send(scope, send, _FAILED))
        else:
            await _send(scope, send, _NOT_FOUND)

    async def _made(self, make_page: Callable[[], ASGIApp]) -> ASGIApp | None:
        """Return the page, None where it cannot be made, which is told once: strangers could fill the log."""
        if self._page is None:
            self._page = asyncio.ensure_future(asyncio.to_thread(_tried, make_page))
        return await asyncio.shield(self._page)


def _tried(make_page: Callable[[], ASGIApp]) -> ASGIApp | None:
    try:
        return make_page()
    except Exception:  # the border: a view or a template that cannot be read
        logger.exception("the page cannot be shown")
        return None


def _is_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )


async def _send(scope: Scope, send: Send, answer: HttpAnswer) -> None:
    """Send an answer in pieces, each when the former has been taken, and close the connection."""
    headers = [
        (b"content-type", answer.content_type.encode("latin-1")),
        (b"content-length", b"%d" % len(answer.body)),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    ]
    if answer.status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"GET, HEAD"))
    await send({"type": "http.response.start", "status": int(answer.status), "headers": headers})
    body = b"" if scope["method"] == "HEAD" else answer.body
    for start in range(0, len(body), _PIECE):
        await send({"type": "http.response.body", "body": body[start : start + _PIECE], "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
