"""`top`: the mail that goes through, as it goes through, until q or Ctrl-C.

A terminal is put back as it was whatever happens. While Redis is away the last frame stays, and says so.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live
from rich.text import Text

from relay.cockpit import top
from relay.cockpit.readiness import Verdict
from relay.cockpit.top import SORTS, Frame, Look
from relay.command.connection import ledger_of
from relay.command.exit_status import WELL
from relay.command.output import Output, terminal_width, wants_colour
from relay.config.loader import Settings
from relay.mail.text import printable

_VERDICT_SECONDS = 30.0  # a verdict reads the flow of five weeks
_UNBOUNDED = 10_000  # columns where no terminal is
_KEYS = "q quit   space freeze   d one server   s sort"


class _Watch:
    """The frames, and what the keys have made of how they are shown."""

    def __init__(self, connection: Any, settings: Settings) -> None:
        self._connection = connection
        self._settings = settings
        self._verdicts: Sequence[Verdict] | None = None
        self._judged_at = float("-inf")
        self.frame = self.look()
        self.trouble = ""
        self.is_frozen = False
        self.how = Look(encoding=sys.stdout.encoding or "ascii")

    def look(self) -> Frame:
        """Look now. Raises RedisError."""
        if time.monotonic() - self._judged_at >= _VERDICT_SECONDS:
            self._verdicts = None
        frame = top.look(self._connection, self._settings, self._verdicts)
        if self._verdicts is None:
            self._verdicts, self._judged_at = frame.verdicts, time.monotonic()
        return frame

    def go_on(self) -> None:
        """Take the next frame, unless they are frozen; trouble with Redis leaves the last one."""
        if self.is_frozen:
            return
        try:
            self.frame, self.trouble = self.look(), ""
        except (RedisError, OSError) as error:
            self.trouble = f"Redis: {printable(str(error))}"

    def press(self, key: str) -> bool:
        """Do what a key says; False: it is to end."""
        names = ["", *(row.name for row in self.frame.rows if not row.is_primary)]
        if key in {"q", "Q", "\x03", "\x04"}:
            return False
        if key == " ":
            self.is_frozen = not self.is_frozen
        elif key == "s":
            self.how = replace(self.how, sort=_after(list(SORTS), self.how.sort))
        elif key == "d":
            self.how = replace(self.how, only=_after(names, self.how.only))
        return True

    def text(self) -> Text:
        """Return the frame as it is to be shown."""
        size = shutil.get_terminal_size()
        note = self.trouble or ("frozen" if self.is_frozen else "")
        how = replace(self.how, width=size.columns, height=size.lines - 1, note=note)
        shown = top.lines(self.frame, how)
        return Text("\n".join([*shown, *[""] * (how.height - len(shown)), _KEYS[: size.columns]]), no_wrap=True)


def _after(names: list[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)] if name in names else names[0]


def show(settings: Settings, out: Output, interval: float, once: bool) -> int:
    """Show frames until somebody ends it; one only, where no terminal is or it is asked for."""
    with ledger_of(settings) as connection:
        watch = _Watch(connection, settings)
        if out.as_json:
            _objects(watch, out, interval, once=once)
        elif once or not sys.stdout.isatty():
            is_narrow = sys.stdout.isatty() and not out.wide
            how = replace(watch.how, width=terminal_width() if is_narrow else _UNBOUNDED, screen=False)
            for line in top.lines(watch.frame, how):
                out.line(line)
        else:
            _live(watch, interval, colour=wants_colour(out.colour))
    return WELL


def _objects(watch: _Watch, out: Output, interval: float, *, once: bool) -> None:
    while True:
        out.object(watch.frame.as_object())
        if once:
            return
        sys.stdout.flush()
        time.sleep(interval)
        watch.frame = watch.look()


def _live(watch: _Watch, interval: float, *, colour: bool) -> None:
    console = Console(no_color=not colour, highlight=False)
    live = Live(watch.text(), console=console, screen=True, auto_refresh=False)
    with _keys() as key, _interrupts() as interrupted:
        try:  # its start included: a Ctrl-C at the first frame must leave no strange screen behind
            live.start(refresh=True)
            _go_on(watch, live, key, interval, interrupted)
        finally:
            live.stop()


def _go_on(watch: _Watch, live: Live, key: Callable[[float], str], interval: float, interrupted: Sequence[int]) -> None:
    """Show frame after frame until a key ends it. Raises KeyboardInterrupt."""
    while not interrupted:
        until = time.monotonic() + interval
        while (patience := until - time.monotonic()) > 0:
            if pressed := key(patience):
                if not all(map(watch.press, pressed)):
                    return
                live.update(watch.text(), refresh=True)
        watch.go_on()
        live.update(watch.text(), refresh=True)
    raise KeyboardInterrupt


@contextmanager
def _interrupts() -> Iterator[Sequence[int]]:
    """Note each Ctrl-C as well: what a signal raises is lost where it meets a finalizer, of which a frame has many."""
    came: list[int] = []

    def note(number: int, _frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Give what waits for keys; where nobody can press one, it only waits."""
    if not sys.stdin.isatty():
        yield _nobody
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def key(patience: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], patience)
        if not ready:
            return ""
        octets = os.read(descriptor, 64)
        return octets.decode("ascii", "ignore") if octets else "q"  # the terminal has gone

    try:
        tty.setcbreak(descriptor, termios.TCSADRAIN)  # what was typed before counts, too
        yield key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _nobody(patience: float) -> str:
    time.sleep(patience)
    return ""
