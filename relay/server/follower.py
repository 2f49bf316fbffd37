"""How one relay process follows a promotion: it prepares what it is asked for, and takes a decision that was made.

What is asked and decided comes with the beat that the process sends anyway (relay.topology.heartbeats). While a
promotion is prepared the process opens a connection to the new primary as for mail, and says whether that went well.
Once it is decided, the next transactions have the new roles; those under way keep theirs. A decision that these
settings do not know, one that makes no sense, and an epoch lower than one that was seen change nothing, and are told.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.client.errors import ClientError
from relay.config.loader import Settings
from relay.ledger import registry
from relay.mail.destination import Destination
from relay.mail.text import printable
from relay.smtpd.context import Context
from relay.smtpd.primary import Primary
from relay.smtpd.snapshot import Snapshot
from relay.topology import remembered, roles, route_roles
from relay.topology.heartbeats import Pulse
from relay.topology.roles import Roles
from relay.topology.state import Intent, Topology, read_or_why

_DISK_SECONDS = 2.0  # a disk that hangs keeps nobody from following
_SOON = 0.2  # seconds to the next beat while a promotion is under way
_TRY_AGAIN_SECONDS = 5.0
_UNDER_WAY_SECONDS = 15.0  # so long after it, transactions that go on with the former primary are told as soon


class Follower:
    """The roles of one relay process, from its start on."""

    def __init__(self, settings: Settings, pulse: Pulse, connect_to: Callable[[Destination], Primary]) -> None:
        """``connect_to`` makes a primary of a server, without any connection yet."""
        self._settings = settings
        self._pulse = pulse
        self._connect_to = connect_to
        self._topology = remembered.load(settings.state_dir)  # the highest epoch that was seen
        self.roles = (self._topology and roles.decided(settings, self._topology)) or roles.as_settings_say(settings)
        self._context: Context | None = None
        self._retired: list[Snapshot] = []
        self._seen: str | None = None  # what was last found in Redis
        self._trouble = ""  # why that is not followed
        self._is_kept = True  # whether what is followed is on disk
        self._next_try = 0.0  # loop time
        self._is_registered = False  # whether the ledger knows all who get copies now
        self._intent: Intent | None = None
        self._preparing: asyncio.Task[None] | None = None
        self._ready: Primary | None = None  # the one that is prepared
        self._answer = ("", "")  # to the intent: its id, and why we cannot
        self._news = asyncio.Event()  # something is to be told at once
        self._busy_until = 0.0  # loop time
        self._tell()

    def begin(self) -> Snapshot:
        """Return the snapshot to begin with."""
        return Snapshot(self._connect_to(self.roles.primary), self.roles.backups, self.roles.epoch)

    @property
    def copied(self) -> tuple[Destination, ...]:
        """Everybody who may get copies now."""
        return roles.copied(self._settings, self.roles.backups, self.roles.routes)

    def serve(self, context: Context) -> None:
        """Change the snapshot of this context from now on."""
        self._context = context

    def wake(self) -> None:
        """Have the next beat sent at once."""
        self._news.set()

    async def pause(self, seconds: float) -> None:
        """Wait for the next beat; shorter while a promotion is under way or there is something to tell."""
        is_busy = bool(self._in_old()) and asyncio.get_running_loop().time() < self._busy_until
        with contextlib.suppress(TimeoutError):
            # Not wait_for(): in Python 3.11 it swallows a cancellation that comes together with the news.
            async with asyncio.timeout(_SOON if is_busy or self._intent else seconds):
                await self._news.wait()
        self._news.clear()
        self._pulse.in_old = self._in_old()

    async def follow(self, ledger: Redis) -> None:
        """Do what the last beat has brought. ``ledger`` hears of the new backups."""
        found = self._pulse.topology
        is_to_keep = not self._is_kept and asyncio.get_running_loop().time() >= self._next_try
        if found is not None and (found != self._seen or is_to_keep):
            self._seen = found
            await self._look(found)
        if not self._is_registered:
            await self._register(ledger)
        self._prepare(self._pulse.intent)

    async def close(self) -> None:
        """Close what is open beside the snapshot that serves."""
        self._stop_preparing()
        for snapshot in self._retired:
            await snapshot.primary.pool.close()

    # --- a decision -----------------------------------------------------------------------------------------------

    async def _look(self, text: str) -> None:
        known = self._topology
        found, nonsense = read_or_why(text, Topology.from_json)
        if nonsense:
            self._disagree(f"what Redis holds as topology makes no sense: {nonsense}")
        elif known and (found is None or found.epoch < known.epoch):
            older = f"epoch {found.epoch}" if found else "none"
            self._disagree(
                f"it keeps epoch {known.epoch} with {known.primary}: Redis has an older one, {older}; "
                f"`smtp-dup promote {known.primary}` puts it back"
            )
        elif found:
            trouble = await self._remember(found) if found != known or not self._is_kept else ""
            self._topology = found
            decided = roles.decided(self._settings, found)
            if decided is None:
                self._disagree(f"its settings do not name {found.primary}, which was promoted: add it, and reload")
            else:
                if decided != self.roles:
                    self._adopt(decided, found)
                self._disagree("; ".join([trouble] * bool(trouble) + list(route_roles.troubles(self._settings, found))))
        else:
            self._disagree("")

    def _disagree(self, trouble: str) -> None:
        """Note why what stands in Redis is not followed; "" where it is."""
        if trouble and trouble != self._trouble:
            maillog.notice("warning", "the topology is not followed", reason=trouble)
        self._trouble = trouble
        self._tell()

    async def _remember(self, topology: Topology) -> str:
        """Put it on disk before anything is done by it: we never go back behind it. Returns what went wrong."""
        self._is_kept, self._next_try = False, asyncio.get_running_loop().time() + _TRY_AGAIN_SECONDS
        try:
            await asyncio.wait_for(
                asyncio.to_thread(remembered.save, self._settings.state_dir, topology), _DISK_SECONDS
            )
        except OSError as error:  # TimeoutError is one
            return f"its state folder cannot be written: {printable(str(error)) or 'the disk does not answer'}"
        self._is_kept = True
        return ""

    def _adopt(self, decided: Roles, topology: Topology) -> None:
        """Have the next transactions begin with the new roles."""
        before, self.roles = self.roles, decided
        self._is_registered = False
        if self._context is not None:
            old, primary = self._context.snapshot, self._next_primary(decided.primary)
            self._context.snapshot = Snapshot(primary, decided.backups, decided.epoch, old)
            if self._context.route_primaries is not None:
                self._context.route_primaries.follow(decided.routes)
            self._retired = [s for s in self._retired if s.in_use] + [old]
            self._busy_until = asyncio.get_running_loop().time() + _UNDER_WAY_SECONDS
        if decided.primary.name != before.primary.name:
            now = topology.now
            maillog.promoted(decided.primary.name, before.primary.name, decided.epoch, by=now.by, reason=now.reason)

    def _next_primary(self, server: Destination) -> Primary:
        """Return the one that is prepared, or that serves already, or a new one."""
        ready, self._ready = self._ready, None
        serving = self._context.snapshot.primary if self._context else None
        if ready is not None and ready.destination == server:
            return ready
        _close(ready)
        return serving if serving is not None and serving.destination == server else self._connect_to(server)

    async def _register(self, ledger: Redis) -> None:
        """Tell the ledger where copies go now, so that whatever is pending there is delivered."""
        try:
            async with ledger.pipeline(transaction=True) as pipe:
                registry.register(pipe, self.copied)
                await pipe.execute()
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("a change of the roles", error)
        else:
            self._is_registered = True

    # --- an intent ------------------------------------------------------------------------------------------------

    def _prepare(self, text: str) -> None:
        """Begin with an intent that is new, and end with one that is gone."""
        intent, _ = read_or_why(text, Intent.from_json)  # without sense: whoever asks will not find us prepared
        if intent == self._intent:
            return
        self._stop_preparing()
        self._intent, self._answer = intent, ("", "")
        self._tell()
        if intent:
            self._preparing = asyncio.get_running_loop().create_task(self._try(intent))

    async def _try(self, intent: Intent) -> None:
        """Find out whether we can use the new primary; what was opened is kept for its mail."""
        trouble = self._objection(intent)
        if not trouble and intent.route:
            primaries = self._context.route_primaries if self._context else None
            servers = intent.servers or route_roles.as_set(self._settings, intent.route)
            trouble = await primaries.prepare(servers, self._context.snapshot) if primaries and self._context else ""
        elif not trouble:
            known = (self._settings.primary, *self._settings.backups)
            primary = self._connect_to(next(s for s in known if s and s.name == intent.primary))
            try:
                await primary.connect()
            except ClientError as error:
                trouble = f"{primary.destination.address} cannot be used: {error}"
                _close(primary)
            except BaseException:
                _close(primary)
                raise
            else:
                self._ready = primary
        self._answer = intent.id, printable(trouble)
        self._tell()

    def _objection(self, intent: Intent) -> str:
        if self._topology and intent.epoch <= self._topology.epoch:
            return f"it has seen epoch {self._topology.epoch} already"
        return roles.objection(self._settings, intent)

    def _stop_preparing(self) -> None:
        if self._preparing is not None:
            self._preparing.cancel()
            self._preparing = None
        _close(self._ready)
        self._ready = None

    # --- what is told ---------------------------------------------------------------------------------------------

    def _in_old(self) -> int:
        return sum(snapshot.in_use for snapshot in self._retired)

    def _tell(self) -> None:
        pulse = self._pulse
        prepared, objection = self._answer
        before = (pulse.epoch, pulse.primary, pulse.prepared, pulse.trouble, pulse.routes)
        pulse.routes = route_roles.followed(self._settings, self._topology)
        pulse.epoch, pulse.primary = self._topology.epoch if self._topology else 0, self.roles.primary.name
        pulse.prepared, pulse.trouble = prepared, objection if prepared else self._trouble
        if before != (pulse.epoch, pulse.primary, pulse.prepared, pulse.trouble, pulse.routes):
            self._news.set()


def _close(primary: Primary | None) -> None:
    """Close what was opened for a primary that nobody has served with."""
    if primary is not None:
        Snapshot(primary, ()).retire()
