"""What a page shows while it is open: parts of it, sent again when they have changed, over one stream of events a tab.

All who look at the same view get one look at the ledger a second. A stream ends when this process stops, when its
session is over, and when there are too many; the browser comes back by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from redis.exceptions import RedisError
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from relay.json_text import json_text
from relay.page.access import is_still_there
from relay.page.context import PageContext

MOST = 32  # streams at once
MOST_OF_NOBODY = 8  # of them, of those who have not logged in
_RETRY_MS = 3000  # after which a browser comes back
_LOOK = 0.2  # seconds between two looks whether this process stops
_ALIVE = 15.0  # seconds after which a silent stream says that it lives
_SESSION = 5.0  # seconds between two looks whether the session is still one
_KEPT = 128  # answers that are shared
_HEADERS = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}

T = TypeVar("T")
Parts = Mapping[str, str]  # id of an element -> what it becomes
LookAgain = Callable[[], Awaitable[Parts]]


class SharedAnswers:
    """Answers that all who ask within some seconds have in common."""

    def __init__(self) -> None:
        self._found: OrderedDict[object, tuple[float, asyncio.Future[Any]]] = OrderedDict()

    async def get(self, key: object, seconds: float, find: Callable[[], Awaitable[T]]) -> T:
        """Return what ``find`` says, or has said within so many seconds. Raises what it raises."""
        at, answer = self._found.get(key, (0.0, None))
        is_fresh = answer is not None and (not answer.done() or time.monotonic() - at < seconds)
        if answer is None or not is_fresh or (answer.done() and (answer.cancelled() or answer.exception())):
            answer = asyncio.ensure_future(find())
            self._found[key] = (time.monotonic(), answer)
            self._found.move_to_end(key)
            answer.add_done_callback(lambda done: done.cancelled() or done.exception())
            while len(self._found) > _KEPT:
                self._found.popitem(last=False)
        found: T = await asyncio.shield(answer)  # whoever goes away takes it from nobody else
        return found


class LiveParts:
    """The streams of this process, and the answers that they share."""

    def __init__(self, context: PageContext) -> None:
        self._context = context
        self.shared = SharedAnswers()
        self.streams = 0
        self._of_nobody = 0

    def stream(
        self,
        request: Request,
        every: float,
        look: LookAgain,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Response:
        """Return a stream of what ``look`` finds anew every so many seconds, until ``is_over``."""
        if self.streams >= MOST or (not request.state.visitor.may_see and self._of_nobody >= MOST_OF_NOBODY):
            return PlainTextResponse(
                f"{MOST} pages are live already: load this one again to see what is new\n", 503, {"Retry-After": "10"}
            )
        return StreamingResponse(
            self._events(request, every, look, is_over), media_type="text/event-stream", headers=_HEADERS
        )

    async def _events(
        self, request: Request, every: float, look: LookAgain, is_over: Callable[[], bool]
    ) -> AsyncIterator[str]:
        nobody = int(not request.state.visitor.may_see)
        self.streams += 1
        self._of_nobody += nobody
        try:
            yield f"retry: {_RETRY_MS}\n\n"
            if self.streams > MOST:  # many have asked at the same moment
                return
            sent: dict[str, str] = {}
            said_at = asked_at = time.monotonic()
            while not self._context.is_stopping:
                was_over = is_over()
                try:
                    if time.monotonic() - asked_at >= _SESSION:
                        asked_at = time.monotonic()
                        if not await is_still_there(request):
                            yield "event: gone\ndata: {}\n\n"
                            return
                    parts = dict(await look())
                except (RedisError, OSError, TimeoutError):
                    yield 'event: stale\ndata: {"why": "Redis does not answer"}\n\n'
                    said_at = time.monotonic()
                else:
                    news = {name: text for name, text in parts.items() if sent.get(name) != text}
                    sent |= news
                    if news or time.monotonic() - said_at >= _ALIVE:
                        said_at = time.monotonic()
                        yield f"event: parts\ndata: {json_text(news)}\n\n"
                    if was_over:
                        yield "event: over\ndata: {}\n\n"
                        return
                await self._wait(every)
        finally:
            self.streams -= 1
            self._of_nobody -= nobody

    async def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._context.is_stopping and (left := end - time.monotonic()) > 0:  # noqa: ASYNC110 - of threads
            await asyncio.sleep(min(_LOOK, left))


def live_of(request: Request) -> LiveParts:
    """Return the streams of the page that a request is for."""
    found: LiveParts = request.app.state.live
    return found
