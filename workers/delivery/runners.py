"""A courier's runners: each takes copy after copy to the server, as many at once as the breaker's window allows.

One on which the server hangs (a scanner, on one message) does not count for the window after a few seconds: it keeps
its connection, another takes its turn, and what was begun behind it goes elsewhere. Slow and quick ones together have
no more connections than the pool has room for. Where several hang and nothing at all goes through for a while, it is
the server that is in trouble, and the breaker opens. Where slow ones have taken all connections although others went
through quickly meanwhile, the one that has waited longest, more than a minute, loses its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine

from relay import maillog
from relay.client.connection import Connection
from relay.client.pool import Pool
from workers.delivery.batches import Batches
from workers.delivery.retry import Breaker

SLOW = 3.0  # seconds that a transaction counts for the window
_LOOK_SECONDS = 0.25
_HANGING = 3  # transactions that hang at once, nothing going through ...
_HANGING_SECONDS = 20.0  # ... for so long, before it is the server
_PATIENCE = 60.0  # seconds that nobody loses a connection for others
_QUICK = 20  # transactions that went through quickly meanwhile: the server is not just slow

Run = Callable[["Runner"], Coroutine[object, object, None]]


class Runner:
    """One task with a connection, or on its way to one, and how long what it does now has been going on."""

    __slots__ = ("_runners", "begun_at", "carried", "connection", "gave_up", "is_slow", "let_go", "quick")

    def __init__(self, runners: Runners) -> None:
        self._runners = runners
        self.is_slow = False
        self.begins(None)

    def begins(self, connection: Connection | None, let_go: Callable[[], None] = lambda: None) -> None:
        """Note that a transaction begins; ``let_go`` is called once if it turns out to be a slow one."""
        runners = self._runners
        self.connection = connection
        self.let_go = let_go
        self.begun_at = runners.breaker.clock()
        self.carried = runners.breaker.carried
        self.quick = runners.quick
        self.gave_up = False
        if self.is_slow:
            self.is_slow = False
            runners.slow -= 1

    def ends(self) -> None:
        """Note that the server carried the transaction through."""
        if self._runners.breaker.clock() - self.begun_at < SLOW:
            self._runners.quick += 1

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
    """The runners of one courier; ``run`` is what one does as long as ``has_turn`` says so."""

    def __init__(self, pool: Pool, batches: Batches, breaker: Breaker, *, run: Run) -> None:
        self._pool = pool
        self._batches = batches
        self.breaker = breaker
        self._run = run
        self._runners: dict[asyncio.Task[None], Runner] = {}
        self.slow = 0
        self.quick = 0  # transactions carried through in a short time

    def __len__(self) -> int:
        return len(self._runners)

    def hire(self) -> None:
        """Have as many runners as the window allows, the work needs, and there are connections for."""
        count = len(self._runners)
        missing = self.breaker.window - (count - self.slow)
        if missing > 0:
            missing = min(missing, self._batches.copies_left, self._pool.room - count)
        for _ in range(missing):
            self.employ(self._run)

    def employ(self, run: Run) -> asyncio.Task[None]:
        """Have a runner for this alone."""
        runner = Runner(self)
        task = asyncio.get_running_loop().create_task(self._employed(run, runner))
        self._runners[task] = runner
        task.add_done_callback(self._leave)
        return task

    def has_turn(self, runner: Runner) -> bool:
        """Say whether a runner may go on with another transaction; it has none now."""
        runner.begins(None)
        return len(self._runners) - self.slow <= self.breaker.window and len(self._runners) <= self._pool.room

    async def watch(self) -> None:
        """Look after those that hang; runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._runners:
                self._look()

    @staticmethod
    async def _employed(run: Run, runner: Runner) -> None:
        await run(runner)

    def _leave(self, task: asyncio.Task[None]) -> None:
        """Let a runner go; what it leaves undone is seen to by the jobs."""
        runner = self._runners.pop(task)
        self.slow -= runner.is_slow
        self._batches.wake()
        if not task.cancelled() and (fault := task.exception()) is not None:
            maillog.task_failed("delivery", fault)

    def _look(self) -> None:
        now, breaker = self.breaker.clock(), self.breaker
        for runner in list(self._runners.values()):
            if not runner.is_slow and now - runner.begun_at >= SLOW:
                runner.is_slow = True
                self.slow += 1
                runner.let_go()
        if not self.slow:
            return
        if self._batches.copies_left and not breaker.is_open:
            slow = [runner for runner in self._runners.values() if runner.is_slow]
            hanging = [runner.begun_at for runner in slow if runner.carried == breaker.carried]
            if len(hanging) >= min(_HANGING, self._pool.room) and now - min(hanging) >= _HANGING_SECONDS:
                breaker.opens(f"no reply to {len(hanging)} messages at once for {now - min(hanging):.0f} s")
            elif len(self._runners) >= self._pool.room:
                self._make_room(slow, now)
        self._batches.wake()

    def _make_room(self, slow: list[Runner], now: float) -> None:
        idle = [
            runner
            for runner in slow
            if not runner.gave_up and now - runner.begun_at >= _PATIENCE and self.quick - runner.quick >= _QUICK
        ]
        if idle:
            min(idle, key=lambda runner: runner.begun_at).give_up()
