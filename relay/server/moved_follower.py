"""How one relay process follows the moves of mailboxes: it takes each generation of the map as soon as it hears of it.

Its state comes with the beat that the process sends anyway (relay.topology.heartbeats). The map is read in a thread,
and the next transactions go by it; those under way keep the one that they began with. What cannot be followed changes
nothing, is told with the beat, and is tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from redis import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.config.model import Settings
from relay.ledger import registry
from relay.mail.text import count, printable
from relay.routing import moved_copy
from relay.routing.moved_copy import MovedMap
from relay.topology.agreement import fingerprints
from relay.topology.heartbeats import Pulse
from relay.topology.roles import may_be_copied

_TRY_AGAIN_SECONDS = 5.0
_SOON_SECONDS = 15.0  # so long after a move the next one is heard of soon: who moves mailboxes moves several


class MovedFollower:
    """The map of moved mailboxes of one relay process, from its start on."""

    def __init__(
        self,
        settings: Settings,
        pulse: Pulse,
        connection: Redis,
        on_change: Callable[[], object],
        on_news: Callable[[], object],
    ) -> None:
        """``on_change`` is called when the next transactions go by another map, ``on_news`` to have that told."""
        self._settings = settings
        self._pulse = pulse
        self._connection = connection
        self._on_change, self._on_news = on_change, on_news
        self._following: asyncio.Task[None] | None = None
        self.map = moved_copy.load_or_tell(settings.state_dir)
        self._seen: str | None = None  # what was last found in Redis
        self._trouble = ""
        self._next_try = 0.0  # loop time
        self._busy_until = 0.0
        self.is_idle = asyncio.Event()  # nothing is being read
        self.is_idle.set()
        self._is_registered = False  # whether the ledger knows all who may get copies because of it
        pulse.settings = fingerprints(settings)
        pulse.servers = [server.name for server in settings.named]
        self._tell("")

    @property
    def is_busy(self) -> bool:
        """Whether mailboxes are being moved."""
        return asyncio.get_running_loop().time() < self._busy_until

    def follow(self) -> None:
        """Begin to do what the last beat has brought: reading a large map takes longer than a beat may be late."""
        if not self.is_idle.is_set():
            return
        loop, found = asyncio.get_running_loop(), self._pulse.moves
        is_new = found is not None and (found != self._seen or (self._trouble and loop.time() >= self._next_try))
        if is_new or (len(self.map) and not self._is_registered):
            self.is_idle.clear()
            self._following = loop.create_task(self._follow(found if is_new else None))

    async def _follow(self, found: str | None) -> None:
        try:
            if found is not None:
                await self._read(found)
            if len(self.map) and not self._is_registered:
                # So that whatever is pending there is delivered.
                with contextlib.suppress(RedisError, OSError):  # tried again with the next beat
                    await asyncio.to_thread(registry.register_now, self._connection, may_be_copied(self._settings))
                    self._is_registered = True
        except Exception as error:  # the border: mail continues, and what could not be followed is tried again
            maillog.task_failed("reading who has moved", error)
        finally:
            self.is_idle.set()

    async def _read(self, found: str) -> None:
        """Take the map as it is in Redis now."""
        self._next_try = asyncio.get_running_loop().time() + _TRY_AGAIN_SECONDS
        state_dir = self._settings.state_dir
        try:
            made, trouble = await asyncio.to_thread(moved_copy.follow, self._connection, state_dir, self.map)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("reading who has moved", error)
            return
        self._seen = found
        self._take(made)
        self._tell(trouble)
        self._on_news()

    def _take(self, made: MovedMap) -> None:
        if made is self.map:
            return
        before, self.map = self.map, made
        self._is_registered = self._is_registered and bool(len(before))
        self._busy_until = asyncio.get_running_loop().time() + _SOON_SECONDS
        self._on_change()
        servers = ",".join(f"{name}={number}" for name, number in sorted(made.servers.items()))
        maillog.notice("info", "who has moved", generation=made.state.generation, entries=len(made), servers=servers)

    def _tell(self, trouble: str) -> None:
        names = {server.name for server in self._settings.named}
        unknown = {name: number for name, number in self.map.servers.items() if name not in names}
        if unknown and not trouble:
            shown = ", ".join(
                f"{name} ({count(number, 'mailbox', 'mailboxes')})" for name, number in sorted(unknown.items())
            )
            trouble = f"its settings do not name {shown}, to which they have moved: add it, and reload (others answer)"
        if trouble and trouble != self._trouble:
            maillog.notice("warning", "who has moved is not followed as it is in Redis", reason=trouble)
        self._trouble = printable(trouble)
        self._pulse.moved, self._pulse.moved_trouble = self.map.state.generation, self._trouble
