"""``python -m bench [ROW ...]``: run rows of the benchmark and write a report below bench/results/.

``python -m bench compare REV`` runs the working tree and a commit in turn.

The exit status is 1 when a count is wrong (a message lost, doubled or refused), never because something is slow.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markdown import Markdown

from bench import machine, peers, plots, report
from bench.course import Course, Options, progress_bar
from bench.results import Row
from bench.rows import (
    accept,
    backups,
    behind_postfix,
    compare,
    cpu,
    greylist,
    idle,
    jobs,
    large,
    latency,
    memory,
    million,
    rtt,
    start,
    throughput,
)

_COMPARE = "compare"  # runs only by name: it wants a commit

ROWS: Mapping[str, Callable[[Course], Row]] = {
    "accept": accept.run,
    "throughput": throughput.run,
    "cpu": cpu.run,
    "behind-postfix": behind_postfix.run,
    "latency": latency.run,
    "large": large.run,
    "memory": memory.run,
    "idle": idle.run,
    "backups": backups.run,
    "rtt": rtt.run,
    "greylist": greylist.run,
    "jobs": jobs.run,
    "start": start.run,
    "million": million.run,
    _COMPARE: compare.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    names, revision = _asked(parser, arguments.rows)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)  # as Ctrl-C: everything that was started is stopped
    options = Options(
        rounds=arguments.rounds or (1 if arguments.quick else 5),
        seconds=arguments.seconds,
        sessions=arguments.sessions,
        size=arguments.size,
        quick=arguments.quick,
        peers=tuple(arguments.peers or ()),
        million=arguments.million,
        revision=revision,
    )
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if argv is None else argv)])
    rows, path = _run(options, names, command)
    Console().print(Markdown((path / "report.md").read_text()) if sys.stdout.isatty() else str(path / "report.md"))
    faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults]
    for fault in faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _asked(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], str]:
    """Return the rows that the command line names, and the commit to compare with."""
    if words[:1] == [_COMPARE]:
        if len(words) != 2:
            parser.error(f"{_COMPARE} takes one commit")
        return words[:1], words[1]
    rows = [name for name in ROWS if name != _COMPARE]
    if unknown := set(words) - set(rows):
        parser.error(f"no row {min(unknown)!r}; there are {', '.join(rows)}")
    return list(dict.fromkeys(words)) or rows, ""


def _run(options: Options, names: Sequence[str], command: str) -> tuple[list[Row], Path]:
    about, warnings = machine.describe(), machine.warnings()
    path = report.folder()
    if options.quick:
        warnings.append("this is the short form: it shows whether every count is right, its figures mean nothing")
    if full := peers.enough_disk(path):
        warnings.append(full)
    rows: list[Row] = []
    with progress_bar() as progress:
        course = Course(options, progress)
        everything = progress.add_task("all rows", total=len(names))
        for name in names:
            begun = time.monotonic()
            row = ROWS[name](course)
            row.seconds = time.monotonic() - begun
            rows.append(row)
            if not plots.draw(row, path):
                row.notes.append("no plots: matplotlib is not installed (extra smtp-dup[bench])")
            report.write(path, rows, about, warnings, command)
            progress.advance(everything)
    return rows, path


def _stop(number: int, _: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of smtp-dup.")
    rows = ", ".join(name for name in ROWS if name != _COMPARE)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {rows} (default all); or: {_COMPARE} REV")
    parser.add_argument("--rounds", type=int, default=0, help="of each measurement; the median counts (default 5)")
    parser.add_argument("--seconds", type=float, default=8.0, help="that one load should last (default 8)")
    parser.add_argument("--sessions", type=int, default=20, help="connections of the load (default 20)")
    parser.add_argument("--size", type=int, default=4096, help="octets of a message (default 4096)")
    parser.add_argument("--peers", nargs="+", choices=peers.NAMES, help="throughput: only these")
    parser.add_argument("--million", type=int, default=1_000_000, help="copies in the row of that name")
    parser.add_argument("--quick", action="store_true", help="one short round: is every count right?")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt as interruption:
        sys.exit(f"stopped: {interruption}" if str(interruption) else "stopped")
