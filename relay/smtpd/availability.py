"""Whether a server that has a substitute can be used, as one relay process knows it.

Its breaker opens when no connection can be had, or after three transactions in a row that broke off. Probes (connect,
EHLO, QUIT) then find out when it is back. It is used again after it has been there for a time, at first with one
transaction; while nothing else can be had, at once. A server of which nothing has been heard for a while is probed,
too: one that hangs, or a substitute that has died, is known before a client has to wait for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from relay import maillog
from relay.breaker import Breaker
from relay.client.errors import ClientError

T = TypeVar("T")

QUIET_SECONDS = 10.0  # after which a server that has said nothing is probed
_TIMES_AS_LONG = 2  # may a connection take as at the last probe, before it counts as hung
_LOOK_SECONDS = 5.0  # between two probes of a server that is back, until it is used again


class Availability:
    """The standing of one server."""

    def __init__(self, name: str, probe: Callable[[], Awaitable[None]]) -> None:
        """``probe`` raises ClientError while the server cannot be used."""
        self._name = name
        self._probe = probe
        self._breaker = Breaker(1, on_change=self._on_change)
        self._back_since: float | None = None  # monotonic
        self._is_on_trial = False
        self._heard_at = time.monotonic()
        self._usual = 0.0  # seconds that the last probe took
        self._waiting: set[asyncio.Timeout] = set()  # of transactions that may go to another server
        self._probing: asyncio.Task[None] | None = None
        self.told: set[tuple[str, str]] = set()  # (route, substitute) that this turn has been logged for

    @property
    def is_down(self) -> bool:
        """Whether it cannot be used, or has not been used again as yet."""
        return self._breaker.is_open

    @property
    def is_back(self) -> bool:
        """Whether it is down, but answers probes."""
        return self._back_since is not None

    @property
    def reason(self) -> str:
        return self._breaker.reason

    def may_be_used(self, return_after: float) -> bool:
        """Return whether a transaction may begin there, though there are others."""
        if not self._breaker.is_open:
            return True
        since = self._back_since
        return since is not None and time.monotonic() - since >= return_after and not self._is_on_trial

    @contextmanager
    def tried(self) -> Iterator[None]:
        """Note that a transaction tries it: where it has been down, only one at a time."""
        is_trial = self._breaker.is_open and not self._is_on_trial
        self._is_on_trial |= is_trial
        try:
            yield
        finally:
            if is_trial:
                self._is_on_trial = False

    def patience(self, least: float) -> float:
        """Return how many seconds it gets for a connection, while there is another server to go to."""
        return max(least, _TIMES_AS_LONG * self._usual)

    async def wait_for(self, work: Callable[[asyncio.Timeout], Awaitable[T]], seconds: float) -> T:
        """Await it for so many seconds, and only until the server is known to be down. Raises TimeoutError.

        ``work`` gets what ends it, and may give itself more time.
        """
        async with asyncio.timeout(seconds) as limit:
            self._waiting.add(limit)
            try:
                return await work(limit)
            finally:
                self._waiting.discard(limit)

    async def look(self, least: float) -> None:
        """Probe a server that has been quiet, and that nobody has found to be down."""
        if self._breaker.is_open or time.monotonic() - self._heard_at < QUIET_SECONDS:
            return
        try:
            async with asyncio.timeout(self.patience(least)):
                await self._timed_probe()
        except (ClientError, TimeoutError) as error:
            if not self._breaker.is_open:
                self.fails(str(error) or "no answer in time")

    async def _timed_probe(self) -> None:
        begun = time.monotonic()
        await self._probe()
        self._heard_at = time.monotonic()
        self._usual = self._heard_at - begun

    def fails(self, reason: str) -> None:
        """Note that it cannot be used."""
        self._back_since = None
        self._breaker.opens(reason)

    def answers(self) -> None:
        """Note that it answered MAIL: where it was down, that is over."""
        self._heard_at = time.monotonic()
        if self._breaker.is_open:
            self._breaker.works()

    def breaks(self, reason: str) -> None:
        """Note a transaction that broke off after MAIL."""
        self._back_since = None if self._breaker.is_open else self._back_since
        self._breaker.breaks(reason)

    def works(self) -> None:
        """Note a message that it has answered for."""
        self._breaker.works()

    def _on_change(self, breaker: Breaker) -> None:
        if breaker.is_open:
            now = asyncio.get_running_loop().time()
            for limit in [limit for limit in self._waiting if not limit.expired()]:
                limit.reschedule(now)
            if self._probing is None or self._probing.done():
                maillog.primary_down(self._name, breaker.reason)
                self._probing = asyncio.get_running_loop().create_task(self._keep_probing())
        else:
            self._back_since = None
            self.told.clear()
            maillog.primary_back(self._name, breaker.clock() - breaker.opened_at)

    async def _keep_probing(self) -> None:
        while self._breaker.is_open:
            await asyncio.sleep(_LOOK_SECONDS if self.is_back else self._breaker.seconds_to_probe)
            try:
                await self._timed_probe()
            except ClientError as error:
                if self.is_down:  # a transaction may have ended that meanwhile
                    self.fails(str(error) or type(error).__name__)
            else:
                self._back_since = (self._back_since or time.monotonic()) if self.is_down else None

    def close(self) -> None:
        """End the probes."""
        if self._probing is not None:
            self._probing.cancel()
