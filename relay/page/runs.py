"""What takes longer than a request: a look at many copies, the work on them, a promotion. One at a time for a user.

A run goes on in a thread whoever looks, says how far it is, can be stopped between two steps, and is kept for a while.
It is nobody's but who began it. When this process stops, it stops in order: what was done is in the audit, a promotion
that is being prepared is withdrawn, one that is committed holds.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError

from relay.ledger import audit
from relay.ledger.queries import Unknown
from relay.mail.text import printable
from relay.page.context import PageContext

_THREADS = 4
_KEPT = 40  # runs, the oldest that has ended goes first
_KEPT_OF_ONE = 8
_LINES = 200

T = TypeVar("T")


class Stopped(Exception):
    """Somebody wants it to end."""


class NotBegun(Exception):
    """It was not done; the text says why, for the operator."""


@dataclass(slots=True, eq=False)
class Run:
    """One run: what it is, how far it is, and what has come of it.

    ``state`` is works, done, failed or stopped. ``found`` is for what comes next, as what a look has found.
    """

    kind: str
    title: str
    who: str
    back: str  # the path of where it was begun
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    begun: float = field(default_factory=time.time)
    total: int = 0
    steps: int = 0
    state: str = "works"
    progress: str = ""
    lines: list[str] = field(default_factory=list)
    found: Any = None
    is_stop_asked: bool = False

    @property
    def is_over(self) -> bool:
        return self.state != "works"

    @property
    def share(self) -> float | None:
        """How much of it is done, None where nobody knows."""
        return min(1.0, self.steps / self.total) if self.total else None

    def say(self, line: str) -> None:
        """Add a line to what has come of it."""
        if len(self.lines) < _LINES:
            self.lines.append(printable(line))


class Runs:
    """The runs of this process."""

    def __init__(self, context: PageContext) -> None:
        self._context = context
        self._threads = ThreadPoolExecutor(_THREADS, "run")
        self._runs: OrderedDict[str, Run] = OrderedDict()

    def begin(self, run: Run, work: Callable[[Redis, Run], None]) -> Run:
        """Begin a run. Raises NotBegun where this user has one that goes on, or too many go on."""
        going = [other for other in self._runs.values() if not other.is_over]
        if any(other.who == run.who for other in going):
            raise NotBegun("another one of yours goes on: wait for its end, or stop it")
        if len(going) >= _THREADS:
            raise NotBegun("too much goes on at this moment: try again")
        self._forget(run.who)
        self._runs[run.id] = run
        asyncio.get_running_loop().run_in_executor(self._threads, self._do, run, work)
        return run

    def find(self, run_id: str, who: str) -> Run | None:
        """Return a run of this user."""
        run = self._runs.get(run_id)
        return run if run is not None and run.who == who else None

    def going(self, who: str) -> Run | None:
        """Return the run of this user that goes on."""
        return next((run for run in self._runs.values() if run.who == who and not run.is_over), None)

    def until_stopped(self, run: Run, steps: Iterable[T]) -> Iterator[T]:
        """Yield steps as long as nobody wants it to stop."""
        for step in steps:
            if self.is_to_stop(run):
                return
            yield step

    def is_to_stop(self, run: Run) -> bool:
        return run.is_stop_asked or self.is_stopping

    @property
    def is_stopping(self) -> bool:
        """Whether this process ends."""
        return self._context.is_stopping

    def close(self) -> None:
        """Take no more; what goes on sees that this process stops."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self, who: str) -> None:
        over = [run.id for run in self._runs.values() if run.is_over]
        own = [name for name in over if self._runs[name].who == who]
        for name in own:
            self._runs[name].found = None  # what a look has found may be a million copies: one at a time
        for name in {*own[: max(0, len(own) - _KEPT_OF_ONE + 1)], *over[: max(0, len(over) - _KEPT + 1)]}:
            del self._runs[name]

    def _do(self, run: Run, work: Callable[[Redis, Run], None]) -> None:
        try:
            with audit.acting(run.who):
                work(self._context.sync_redis, run)
        except Stopped:
            run.state = "stopped"
        except (NotBegun, Unknown) as error:
            run.say(str(error))
            run.state = "failed"
        except (RedisError, OSError) as error:
            run.say(f"Redis: {error}")
            run.state = "failed"
        except Exception:
            logger.exception("page: {} failed", run.title)
            run.say("This failed; the log of smtp-dup says why.")
            run.state = "failed"
        else:
            run.state = "done" if run.state == "works" else run.state


def who_acts(name: str) -> str:
    """Return how whoever is logged in stands in the audit."""
    return f"{name} (page)"
