"""The HTTP server of the housekeeping process: uvicorn, in a thread, on the socket that the supervisor has bound.

/healthz, /readyz and /metrics are answered first and whatever happens to the page; one that cannot be made is an error
in the log. The socket outlives this process: who connects while it restarts waits for the next.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from loguru import logger
from uvicorn import Config, Server

from relay.config.model import Settings
from relay.page.application import Find, Front
from relay.page.connection import HEAD_OCTETS, HttpConnection
from relay.page.context import PageContext
from relay.page.hosts import is_off

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_FINISH_SECONDS = 5.0  # for the answers in progress when it ends
_ASKED_SECONDS = 0.25  # for the requests that are on their way then


class PageServer(Server):
    """Serves until ``stop`` is set, and disconnects who is overdue."""

    def __init__(self, app: ASGIApp, stop: threading.Event, context: PageContext | None = None) -> None:
        super().__init__(
            Config(
                app,
                loop="uvloop",
                http=HttpConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=HEAD_OCTETS,
                timeout_graceful_shutdown=round(_FINISH_SECONDS),
            )
        )
        self._stop = stop
        self._context = context

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpConnection):
                connection.look(now)
        return await super().on_tick(counter) or self._stop.is_set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let whoever has asked have the answer: another process may be in our place already, and nobody see us go."""
        for server in self.servers:
            server.close()
        begun = time.monotonic()
        while self.server_state.connections and time.monotonic() - begun < _ASKED_SECONDS:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.02)
        watch = asyncio.create_task(self._look_on())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()
            if self._context:
                await self._context.close()

    async def _look_on(self) -> None:
        while True:
            await self.on_tick(1)
            await asyncio.sleep(0.1)


class _ToOurLog(logging.Handler):
    """Puts what uvicorn logs into our log: what a client does wrong is for debugging only."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            logger.opt(exception=record.exc_info).error("page: {}", record.getMessage().strip())
        else:
            logger.debug("page: {}", record.getMessage().strip())


def serve(settings: Settings, listener: socket.socket, answers: Mapping[str, Find], stop: threading.Event) -> None:
    """Answer until ``stop``: health, and the page where it may be; the settings have the address of Redis."""
    log = logging.getLogger("uvicorn")
    if not log.handlers:
        log.addHandler(_ToOurLog())
        log.propagate = False
    context = None if is_off(settings.status) else PageContext.of(settings, stop)
    front = Front(answers, partial(_page, context) if context else None)
    try:
        PageServer(front, stop, context).run(sockets=[listener])
    finally:
        front.close()


def _page(context: PageContext) -> ASGIApp:
    from relay.page import page  # noqa: PLC0415  (10 MB, and a view that cannot be imported must not end health)

    return page.make(context)
