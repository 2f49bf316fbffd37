"""A courier's runners: each takes copy after copy to the server, as many at once as the breaker's window allows.

One on which the server hangs (a scanner, on one message) does not count for the window after a few seconds: it keeps
its connection, another takes its turn, and what was begun behind it goes elsewhere. Slow and quick ones together have
no more connections than the pool has room for. Where several hang and nothing at all goes through for a while, it is
the server that is in trouble, and the breaker opens. Where slow ones have taken all connections and other copies wait,
the one that has waited longest loses its connection after a minute; with one connection that is the only cure. It may
have arrived all the same. So a copy that fails again and again gets more time, as the pauses between its attempts grow,
and a server that is slow with everything gets more once it has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from relay import maillog
from relay.breaker import Breaker
from relay.client.connection import Connection
from relay.client.pool import Pool
from workers.delivery.jobs_in_hand import JobsInHand

SLOW = 3.0  # seconds that a transaction counts for the window
_LOOK_SECONDS = 0.25
_HANGING = 3  # transactions that hang at once, nothing going through ...
_HANGING_SECONDS = 20.0  # ... for so long, before it is the server
PATIENCE = 60.0  # seconds that nobody loses a connection for others
_FIRST_ATTEMPTS = 4  # that take no more than this: the pauses between them are minutes
_DOUBLINGS = 4  # of a copy's patience; beyond that the time-out of the dot counts (RFC 5321 4.5.3.2.6)
_CALMING = 0.9  # how an answer shortens a patience that was lengthened


class Runner:
    """One task with a connection, or on its way to one, and how long what it does now has been going on."""

    __slots__ = ("_runners", "attempts", "begun_at", "carried", "connection", "gave_up", "is_cut", "is_slow", "let_go")

    def __init__(self, runners: Runners) -> None:
        self._runners = runners
        self.is_slow = self.is_cut = False
        self.begins(None)

    def begins(
        self, connection: Connection | None, let_go: Callable[[], None] | None = None, *, attempts: int = 0
    ) -> None:
        """Note that a transaction begins, of a copy that was tried so often before; None: there is none as yet.

        ``let_go`` is called once if it turns out to be a slow one: what was begun behind it is to go elsewhere.
        """
        runners = self._runners
        self.connection = connection
        self.let_go = let_go
        self.begun_at = runners.breaker.clock()
        self.carried = runners.breaker.carried
        self.attempts = attempts
        self.gave_up = False
        if self.is_slow:
            self.is_slow = False
            runners.slow -= 1

    def ends(self) -> None:
        """Note that the server carried the transaction through."""
        runners = self._runners
        seconds = runners.breaker.clock() - self.begun_at
        runners.patience = max(PATIENCE, 2 * seconds, _CALMING * runners.patience)

    @property
    def patience(self) -> float:
        """Seconds that this transaction keeps its connection while others wait for one."""
        doublings = min(max(0, self.attempts - _FIRST_ATTEMPTS), _DOUBLINGS)
        return max(self._runners.patience, PATIENCE * (1 << doublings))

    @property
    def is_outrun(self) -> bool:
        """Whether this transaction is a slow one while the server carried others through."""
        breaker = self._runners.breaker
        return breaker.carried > self.carried and breaker.clock() - self.begun_at >= SLOW

    def give_up(self) -> None:
        """Take the connection away from a transaction that hangs."""
        self.gave_up = True
        if self.connection is not None:
            self.connection.close()


class Runners:
    """The runners of one courier; each goes on as long as ``has_turn`` says so."""

    def __init__(self, pool: Pool, jobs: JobsInHand, breaker: Breaker) -> None:
        self._pool = pool
        self._jobs = jobs
        self.breaker = breaker
        self._runners: dict[asyncio.Task[None], Runner] = {}
        self.slow = 0
        self.patience = PATIENCE  # of this server: more when it is slow with everything

    def __len__(self) -> int:
        return len(self._runners)

    def start_missing(self, work: Callable[[Runner], Coroutine[object, object, None]]) -> None:
        """Start as many more as the window allows, the work needs, and there are connections for."""
        count = len(self._runners)
        allowed = self.breaker.window - (count - self.slow)
        if allowed > 0 and (wanted := min(allowed, self._jobs.copies_left)):
            for _ in range(min(wanted, self._pool.room - count)):
                self.start(work)

    def start(self, work: Callable[[Runner], Coroutine[object, object, None]]) -> asyncio.Task[None]:
        """Start one more, for this work."""
        runner = Runner(self)
        task = asyncio.get_running_loop().create_task(work(runner))
        self._runners[task] = runner
        task.add_done_callback(self._leave)
        return task

    def has_turn(self, runner: Runner) -> bool:
        """Say whether a runner may go on with another transaction; it has none now."""
        runner.begins(None)
        return len(self._runners) - self.slow <= self.breaker.window and len(self._runners) <= self._pool.room

    def cut(self) -> None:
        """Break off what has not come to its dot: a server that hangs does not hold up a stop."""
        for task, runner in self._runners.items():
            is_new = not runner.is_cut
            runner.is_cut = True
            if runner.connection is None and is_new:
                task.cancel()  # on its way to a connection
            elif runner.connection and not (runner.connection.in_data and runner.connection.replies_owed):
                runner.connection.close()

    async def watch(self) -> None:
        """Look after those that hang; runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._runners:
                self._look()

    def _leave(self, task: asyncio.Task[None]) -> None:
        """Let a runner go; what it leaves undone is seen to by the jobs."""
        runner = self._runners.pop(task)
        self.slow -= runner.is_slow
        self._jobs.wake()
        if not task.cancelled() and (fault := task.exception()) is not None:
            maillog.task_failed("delivery", fault)

    def _look(self) -> None:
        now, breaker = self.breaker.clock(), self.breaker
        for runner in list(self._runners.values()):
            if not runner.is_slow and now - runner.begun_at >= SLOW:
                runner.is_slow = True
                self.slow += 1
                if runner.let_go is not None:
                    runner.let_go()
        if not self.slow:
            return
        slow = [runner for runner in self._runners.values() if runner.is_slow]
        if self._jobs.copies_left and not breaker.is_open:
            hanging = [runner.begun_at for runner in slow if runner.carried == breaker.carried]
            if len(hanging) >= _HANGING and now - min(hanging) >= _HANGING_SECONDS:
                breaker.opens(f"no reply to {len(hanging)} messages at once for {now - min(hanging):.0f} s")
        if len(self._runners) >= self._pool.room and (self._jobs.copies_left or self._pool.waiting):
            self._make_room(slow, now)
        self._jobs.wake()

    def _make_room(self, slow: list[Runner], now: float) -> None:
        """Take the connection away from the transaction that has waited longest, if it has had its time."""
        waiting = [runner for runner in slow if not runner.gave_up and now - runner.begun_at >= runner.patience]
        if waiting:
            min(waiting, key=lambda runner: runner.begun_at).give_up()
            self.patience = max(2 * PATIENCE, self.patience)  # a server that is only slow answers the next one
