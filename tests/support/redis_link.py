"""One host's way to a Redis: it can be cut, so that nothing gets through, and mended, so that all of it does, late."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from support.waiting import PATIENCE

T = TypeVar("T")


class RedisLink:
    """A unix socket that passes on to another one, from an event loop in a thread of its own."""

    def __init__(self, path: Path, target: Path) -> None:
        self._path, self._target = path, target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._through = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._path}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._server.close)
        self._call(self._end_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    def cut(self) -> None:
        """Let nothing through any more, either way; connections stay, and new ones are taken."""
        self._loop.call_soon_threadsafe(self._through.clear)

    def mend(self) -> None:
        """Let everything through, also what has been sent meanwhile, by whoever has ended since."""
        self._loop.call_soon_threadsafe(self._through.set)

    def break_off(self) -> None:
        """End all connections, with what was under way."""
        self._call(self._end_all())

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    async def _listen(self) -> None:
        self._through.set()
        self._server = await asyncio.start_unix_server(self._serve, self._path, backlog=1000)

    async def _end_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        try:
            await self._through.wait()
            there, back = await asyncio.open_unix_connection(self._target)
            ends.append(back)
            await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # either side has ended, or we do
        finally:
            self._tasks.discard(task)
            for end in ends:
                end.close()

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            await self._through.wait()
            to.write(data)
            await to.drain()
        with suppress(OSError):
            to.write_eof()
