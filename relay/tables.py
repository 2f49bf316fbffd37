"""Listings on standard output: a table for people, one JSON object a line for programs.

A table is as wide as the terminal; a long value folds, an id is never cut. Where no terminal is, a row is a line
of whatever length it needs. What came from outside is made printable: a sender cannot move anybody's cursor.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relay.envelope import printable

_UNBOUNDED = 10_000  # columns, where nobody looks at a terminal
_ID_WIDTH = 16
_PAGE = 1000  # rows of one table: a long list is not held in memory


class Column(NamedTuple):
    """One column: its title, how a row's value is shown, and whether numbers stand in it."""

    title: str
    show: Callable[[Any], str]
    numbers: bool = False


def as_object(row: Any) -> dict[str, Any]:
    """Return a row as its JSON object."""
    return dataclasses.asdict(row)


def write(rows: Iterable[Any], columns: Sequence[Column], *, as_json: bool, nothing: str) -> None:
    """Write rows, or say that there is nothing. JSON lines go out one by one, however many there are."""
    if as_json:
        for row in rows:
            write_object(row if isinstance(row, dict) else as_object(row))
        return
    rest = iter(rows)
    screen = console()
    while page := list(islice(rest, _PAGE)):
        screen.print(_table(page, columns))
        nothing = ""
    if nothing:
        write_line(nothing)


def _table(rows: Iterable[Any], columns: Sequence[Column]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(
            column.title,
            overflow="fold",
            justify="right" if column.numbers else "left",
            min_width=_ID_WIDTH if column.title == "id" else None,
        )
    for row in rows:
        table.add_row(*(Text(printable(column.show(row))) for column in columns))
    return table


def write_object(value: dict[str, Any]) -> None:
    """Write one JSON object on a line."""
    sys.stdout.write(json.dumps(value, default=str) + "\n")


def write_line(text: str) -> None:
    """Write a line."""
    sys.stdout.write(printable(text) + "\n")


def console() -> Console:
    """Return the console on standard output."""
    if sys.stdout.isatty():
        return Console(highlight=False)
    return Console(highlight=False, width=_UNBOUNDED, no_color=True)


# How values are shown ------------------------------------------------------------------------------------------


def address(text: str) -> str:
    """Return a sender or recipient; the null sender as it is written in SMTP."""
    return text or "<>"


def moment(seconds: float | None) -> str:
    """Return a time, seconds since the epoch, in the local zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def span(seconds: float) -> str:
    """Return a length of time in the two units that matter."""
    rest = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])
