"""The routes that a relay process serves by: its settings' tables as they are now, decided roles, and who has moved.

A table that cannot be read any more leaves the routes as they were. Without routes and without moved mailboxes nothing
is asked of them, and the primary takes all mail.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from redis import Redis

from relay import maillog
from relay.config.loader import Settings
from relay.mail.destination import Destination
from relay.routing.loading import LOOK_SECONDS, Tables
from relay.server import background
from relay.server.follower import Follower
from relay.server.moved_follower import MovedFollower
from relay.smtpd.context import Context
from relay.smtpd.primary import Primary
from relay.smtpd.route_primaries import RoutePrimaries
from relay.topology.heartbeats import Pulse
from relay.topology.roles import as_copied

_MAP_SECONDS = 30.0  # for reading who has moved, while Redis answers: without it all would have their former server


class RoutesInUse:
    """What decides, for the next transactions of a process, which server answers for whom."""

    def __init__(
        self,
        settings: Settings,
        context: Context,
        follower: Follower,
        pulse: Pulse,
        connection: Redis,
        connect_to: Callable[[Destination], Primary],
    ) -> None:
        """``connect_to`` makes a primary of a server, without any connection yet."""
        self._settings = settings
        self._context = context
        self._follower = follower
        self._pulse = pulse
        self._connect_to = connect_to
        self._tables = Tables(settings)
        self._primaries: RoutePrimaries | None = None  # that of the context, or of one who may become it again
        self._tasks: list[asyncio.Task[None]] = []
        self._reloading: asyncio.Task[None] | None = None
        self._has_begun = False
        self.moved = MovedFollower(settings, pulse, connection, self._take_map, follower.wake)

    async def begin(self) -> None:
        """Have clients served by the routes, and by who has moved, from now on."""
        await asyncio.to_thread(self._tables.load)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.moved.is_idle.wait(), _MAP_SECONDS)
        self._has_begun = True
        self._serve()
        self._tasks.append(background.start(self._keep_tables))

    def reload(self) -> None:
        """Read tables that have changed now, without waiting for the next look."""
        if self._settings.route_table:
            self._reloading = asyncio.get_running_loop().create_task(self._read_now())

    def tell(self) -> None:
        """Have the next beat say which servers cannot be used."""
        if self._context.route_primaries is not None:
            self._pulse.down = self._context.route_primaries.down

    async def end(self) -> None:
        """Close what is open to the servers of routes."""
        for task in self._tasks:
            await background.end(task)
        if self._primaries is not None:
            await self._primaries.close()

    def _serve(self) -> None:
        """Have the next transactions go by the routes as they are now."""
        settings, moved = self._settings, self.moved.map
        if not settings.route_table and not len(moved):
            self._context.route_primaries = None
            return
        router = self._tables.router(moved).with_routes(self._follower.roles.routes)
        if self._primaries is None:
            copied = (server for named in settings.named if (server := as_copied(settings, named.name)))
            self._primaries = RoutePrimaries(router, settings.named, copied, self._connect_to)
            self._tasks.append(background.start(self._primaries.watch))
        self._primaries.router = router
        self._context.route_primaries = self._primaries

    def _take_map(self) -> None:
        """Go by who has moved now, once there are routes to go by."""
        if self._has_begun:
            self._serve()

    async def _keep_tables(self) -> None:
        while self._settings.route_table:
            await asyncio.sleep(LOOK_SECONDS)
            await self._read()

    async def _read(self) -> None:
        if await asyncio.to_thread(self._tables.refresh):
            self._serve()

    async def _read_now(self) -> None:
        try:
            await self._read()
        except OSError as error:
            maillog.notice("error", "not reloaded", reason=str(error))
