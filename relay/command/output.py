"""The output of commands: a table for people, one JSON object a line for programs.

Nothing is cut off: if a table is wider than the terminal, each row has a line of columns and below it, indented and
folded, the values that do not fit. With --wide, and without a terminal, each row is one line of any length. Text from
outside is made printable, so that a sender cannot send escape sequences to the terminal. Rows are written in pages.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from relay.json_text import json_text
from relay.mail.text import printable

_NAME = 12  # columns of the name before a value
_HANGING = " " * 3  # before what goes on below a value, which begins a column behind the name
_PAGE = 500  # rows whose widths are looked at together; the ledger is read in as many
_GAP = "  "
_IN_FRONT = re.compile(r"( *)(\S+(?: \S+)? {2,})?")  # of a line: its indentation, and a name with its gap
_WORD = re.compile(r" *[^ ]+")
_INDENT = "    "
_ALIGNED = 60  # columns: where a row may be of any length, a longer value pushes the rest aside
_NARROWEST, _USUAL = 20, 80

GREEN, YELLOW, RED, BOLD, DIM = "32", "33", "31", "1", "2"


class Column(NamedTuple):
    """One column: its title, how a row's value is shown, whether numbers stand in it, and its colour.

    ``detail``: it stands below the others where they do not fit on a line, with its title.
    """

    title: str
    show: Callable[[Any], str]
    numbers: bool = False
    detail: bool = False
    colour: Callable[[Any], str] | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """Standard output, as the command line wants it."""

    as_json: bool = False
    wide: bool = False
    colour: str = "auto"

    def rows(self, rows: Iterable[Any], columns: Sequence[Column], *, nothing: str) -> None:
        """Write rows, or say that there is nothing."""
        if self.as_json:
            for row in rows:
                self.object(row if isinstance(row, dict) else dataclasses.asdict(row))
            return
        table = _Table(columns, 0 if self.wide or not sys.stdout.isatty() else terminal_width(), self.painter())
        rest = iter(rows)
        while page := list(islice(rest, _PAGE)):
            sys.stdout.writelines(line + "\n" for line in table.lines(page))
            sys.stdout.flush()
            nothing = ""
        if nothing:
            self.line(nothing)

    def object(self, value: dict[str, Any]) -> None:
        """Write one JSON object on a line."""
        sys.stdout.write(json_text(value) + "\n")

    def line(self, text: str) -> None:
        """Write a line; what is wider than the terminal goes on at a blank, a long word is the terminal's to fold."""
        width = 0 if self.wide or not sys.stdout.isatty() else terminal_width()
        sys.stdout.writelines(part + "\n" for part in hung(printable(text), width))

    def say(self, text: str, value: dict[str, Any]) -> None:
        """Write a line, or the object that says the same."""
        if self.as_json:
            self.object(value)
        else:
            self.line(text)

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Write a line for each name and value; an empty name goes on with the one before.

        What is wider than the terminal goes on below its beginning.
        """
        paint = self.painter()
        room = terminal_width() - _NAME - len(_HANGING) if sys.stdout.isatty() and not self.wide else 0
        for name, value in pairs:
            first, *others = fold(printable(value), room) if room else [printable(value)]
            sys.stdout.write(f"{paint(f'{name:<{_NAME}}', BOLD if name else '')} {first}\n")
            sys.stdout.writelines(f"{'':<{_NAME}}{_HANGING}{line}\n" for line in others)

    def painter(self) -> Callable[[str, str], str]:
        """Return what paints a text, given a colour; "" is none."""
        return _paint if wants_colour(self.colour) else _plain


def wants_colour(when: str) -> bool:
    """Say whether to colour: always, never, or in a terminal unless NO_COLOR is set (https://no-color.org)."""
    if when != "auto":
        return when == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def terminal_width() -> int:
    """Return how many columns the terminal has, or is to have by COLUMNS."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return max(_NARROWEST, int(asked))
    try:
        return max(_NARROWEST, os.get_terminal_size(sys.__stdout__.fileno() if sys.__stdout__ else 1).columns or _USUAL)
    except (OSError, ValueError):
        return _USUAL


def _paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour and text else text


def _plain(text: str, _colour: str) -> str:
    return text


class _Table:
    """Lays out pages of rows; ``width`` is the terminal's, 0 where a line may be of any length."""

    def __init__(self, columns: Sequence[Column], width: int, paint: Callable[[str, str], str]) -> None:
        self._columns = columns
        self._width = width
        self._paint = paint
        self._widths = [cells_of(column.title) for column in columns]
        self._head: list[int] | None = None  # columns of the first line, by their numbers, as last announced

    def lines(self, page: Sequence[Any]) -> Iterator[str]:
        shown = [[printable(column.show(row)) for column in self._columns] for row in page]
        needed = [max(old, _widest(cells)) for old, cells in zip(self._widths, zip(*shown, strict=True), strict=True)]
        if not self._width:
            needed = [min(width, max(old, _ALIGNED)) for old, width in zip(self._widths, needed, strict=True)]
        head = self._first_line(needed)
        if self._head is None or (self._width and (head != self._head or needed != self._widths)):
            yield from self._titles(head, needed)
        self._head, self._widths = head, needed
        rest = [n for n in range(len(self._columns)) if n not in head]
        plain = self._template() if not rest and not any(column.colour for column in self._columns) else ""
        for row, cells in zip(page, shown, strict=True):
            if plain and (line := plain % tuple(cells)).isascii():
                yield line.rstrip()
            else:
                yield from self._row(row, cells, head, rest)

    def _template(self) -> str:
        """Return what lays out a row of ASCII on one line: most rows are such, and a backlog has thousands."""
        signs = ["" if column.numbers else "-" for column in self._columns]
        return _GAP.join(f"%{sign}{width}s" for sign, width in zip(signs, self._widths, strict=True))

    def _first_line(self, needed: Sequence[int]) -> list[int]:
        every = range(len(self._columns))
        if not self._width or sum(needed) + len(_GAP) * (len(needed) - 1) <= self._width:
            return list(every)
        head: list[int] = []
        used = 0
        for n in every:
            if not self._columns[n].detail:
                used += needed[n] + len(_GAP)
                if used - len(_GAP) > self._width and head:
                    break
                head.append(n)
        return head

    def _titles(self, head: Sequence[int], widths: Sequence[int]) -> Iterator[str]:
        line = _GAP.join(self._aligned(n, self._columns[n].title, widths[n]) for n in head)
        yield self._paint(line.rstrip(), BOLD)
        length = sum(widths[n] for n in head) + len(_GAP) * (len(head) - 1)
        yield "-" * (min(length, self._width) if self._width else length)  # ASCII: every terminal has it

    def _row(self, row: Any, cells: Sequence[str], head: Sequence[int], rest: Sequence[int]) -> Iterator[str]:
        parts = []
        for n in head:
            colour = self._columns[n].colour
            text = cells[n] if n == head[-1] and not self._columns[n].numbers else self._aligned(n, cells[n])
            parts.append(self._paint(text, colour(row)) if colour else text)
        line = _GAP.join(parts).rstrip()
        if len(head) == 1 and 0 < self._width < self._widths[head[0]]:
            yield from fold(line, self._width)  # one column alone
        else:
            yield line
        if not rest:
            return
        details = [f"{self._columns[n].title} {cells[n]}".lstrip() for n in rest if cells[n] not in {"", "-"}]
        yield from _details(details, self._width)

    def _aligned(self, n: int, text: str, width: int | None = None) -> str:
        width = self._widths[n] if width is None else width
        if text.isascii():
            return text.rjust(width) if self._columns[n].numbers else text.ljust(width)
        blanks = " " * (width - cells_of(text))
        return blanks + text if self._columns[n].numbers else text + blanks


def _details(parts: Sequence[str], width: int) -> Iterator[str]:
    """Yield indented lines with as many of the parts as fit on each, a longer one folded."""
    room = width - len(_INDENT)
    line = ""
    for part in parts:
        joined = f"{line}{_GAP} {part}" if line else part
        if cells_of(joined) <= room:
            line = joined
            continue
        if line:
            yield _INDENT + line
        *full, line = fold(part, room)
        for text in full:
            yield _INDENT + text
    if line:
        yield _INDENT + line


def fold(text: str, width: int) -> list[str]:
    """Return text in lines of at most so many columns: broken behind a blank where one is near, else anywhere."""
    lines = []
    while cells_of(text) > width:
        end, cells = 0, cells_of(text[0])
        while cells <= width:
            end += 1
            cells += cells_of(text[end])
        end = max(end, 1)
        blank = text.rfind(" ", end // 2, end)
        cut = blank + 1 if blank > 0 else end
        lines.append(text[:cut].rstrip() if blank > 0 else text[:cut])
        text = text[cut:]
    return [*lines, text]


def hung(text: str, width: int) -> list[str]:
    """Return a text in lines of at most so many columns, 0 for any; it is broken at blanks only, so links stay whole.

    It goes on below the value where a name stands in front, with two blanks or more between, else a little indented.
    """
    if not width or cells_of(text) <= width:
        return [text]
    found = _IN_FRONT.match(text)
    blanks, name = found.groups("") if found else ("", "")
    beside = cells_of(blanks + name)
    indent = " " * beside if name and beside <= width // 3 else blanks[: width // 3] + _HANGING
    lines, line = [], ""
    for word in _WORD.findall(text):
        if line.strip() and cells_of(line + word) > width:
            lines.append(line)
            line = indent + word.lstrip()
        else:
            line += word
    return [*lines, line]


def _widest(cells: Sequence[str]) -> int:
    return max(map(len, cells)) if "".join(cells).isascii() else max(map(cells_of, cells))


def cells_of(text: str) -> int:
    """Return how many columns of a terminal a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
