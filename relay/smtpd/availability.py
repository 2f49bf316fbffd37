"""Whether a server that has a substitute can be used, as one relay process knows it.

Its breaker opens when no connection can be had, or after three transactions in a row that broke off. Probes (connect,
EHLO, QUIT) then find out when it is back. It is used again after it has been there for a time, at first with one
transaction; while nothing else can be had, at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from relay import maillog
from relay.breaker import Breaker
from relay.client.errors import ClientError

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

    def begins(self) -> None:
        """Note that a transaction tries it."""
        self._is_on_trial = self._breaker.is_open

    def ends(self) -> None:
        """Note that the try is over, however it ended."""
        self._is_on_trial = False

    def fails(self, reason: str) -> None:
        """Note that it cannot be used."""
        self._back_since = None
        self._breaker.opens(reason)

    def answers(self) -> None:
        """Note that it answered MAIL: where it was down, that is over."""
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
                await self._probe()
            except ClientError as error:
                if self.is_down:  # a transaction may have ended that meanwhile
                    self.fails(str(error) or type(error).__name__)
            else:
                self._back_since = (self._back_since or time.monotonic()) if self.is_down else None

    def close(self) -> None:
        """End the probes."""
        if self._probing is not None:
            self._probing.cancel()
