"""What a command that takes long owes to whoever waits: a bar on the terminal, and a Ctrl-C that stops in order."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_SLOW = 1.0  # seconds
_SHORT = 1000  # steps for which no bar is worth it


class Stop:
    """Ctrl-C ends what runs between two steps, so that what was done is known; a second one ends it at once."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True

    def until(self, steps: Iterable[T]) -> Iterator[T]:
        """Yield steps as long as nobody wants it to stop."""
        for step in steps:
            if self.is_asked:
                return
            yield step


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar on standard error, where that is a terminal; call what it gives with each step's size."""
    if total <= _SHORT or not sys.stderr.isatty():
        yield lambda _steps: None
        return
    with _bar("MofNCompleteColumn", "TimeRemainingColumn") as bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextmanager
def slow_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error once something has taken a second; call what it gives with how much of how much.

    It goes when the first line of output is written, which belongs in its place.
    """
    begun = time.monotonic()
    with ExitStack() as ends:
        shown: list[Progress] = []

        def tell(done: int, total: int) -> None:
            if not shown and time.monotonic() - begun > _SLOW and sys.stderr.isatty():
                shown.append(ends.enter_context(_bar("TaskProgressColumn")))
                shown[0].add_task(what, total=None)
            for bar in shown:
                bar.update(bar.task_ids[0], completed=done, total=total)

        yield tell


def _bar(*last: str) -> Progress:
    """Make a bar for standard error; ``last`` are rich's names of the columns behind it."""
    from rich import progress as bars  # noqa: PLC0415  (0.1 s, which short commands do not take)
    from rich.console import Console  # noqa: PLC0415  (0.1 s, which short commands do not take)

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *(getattr(bars, name)() for name in last))
    return bars.Progress(*columns, console=Console(stderr=True), transient=True)
