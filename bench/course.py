"""One call of the benchmark: what was asked for, where temporary files live, and what is told on the way.

Everything that a row starts it enters into a ``stack`` of its own, so that it is stopped whatever happens, Ctrl-C
included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.results import Row


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line said. ``seconds`` is how long one load should last; ``size`` is in octets."""

    rounds: int = 5
    seconds: float = 8.0
    sessions: int = 20
    size: int = 4096
    quick: bool = False
    peers: tuple[str, ...] = ()  # only these competitors; empty: all that are installed
    million: int = 1_000_000
    revision: str = ""  # the commit that this tree is compared with

    def scaled(self, usual: int, quick: int) -> int:
        """Return how many of something a row shall do."""
        return quick if self.quick else usual


class Course:
    """What rows share: the options, a folder, the progress bar."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self.options = options
        self._progress = progress

    @contextmanager
    def row(self, row: Row, steps: int) -> Iterator[Stage]:
        """Run a row of so many steps; what it started is stopped and its folder deleted at the end.

        What breaks the row is its fault, and leaves the others their turn.
        """
        task = self._progress.add_task(row.name, total=steps)
        folder = tempfile.TemporaryDirectory(prefix="smtp-dup-bench-", ignore_cleanup_errors=True)
        with folder, ExitStack() as stack:
            stage = Stage(Path(folder.name), stack, self._progress, task, row)
            try:
                yield stage
            except Exception as error:
                stage.fault(f"{type(error).__name__}: {error}"[:2000])
            self._progress.update(task, completed=steps)


@dataclass(slots=True)
class Stage:
    """One row while it runs."""

    folder: Path
    stack: ExitStack
    _progress: Progress
    _task: int
    _row: Row

    def step(self, text: str) -> None:
        """Say that a step is done, and what came out."""
        self._progress.advance(self._task)
        self._progress.console.print(f"{self._row.name}: {text}", highlight=False, markup=False)

    def fault(self, text: str) -> None:
        """Note something wrong, loudly."""
        self._row.faults.append(text)
        self._progress.console.print(f"{self._row.name}: FAULT: {text}", style="bold red", markup=False)


def progress_bar() -> Progress:
    """Return the bar, on standard error; where that is no terminal only the lines of ``step`` are seen."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
