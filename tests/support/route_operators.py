"""Operators at several hosts at once: who moves mailboxes, and who decides who answers, and takes that back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from support.product import Product


class Operator:
    """Somebody at one host who does one thing after the other, as long as mail comes."""

    def __init__(
        self, host: Product, acts: Iterator[Sequence[str]], seed: int, pause: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """``pause`` is between two things, in seconds."""
        self._host, self._acts, self._pause = host, acts, pause
        self._source = random.Random(f"pauses {seed}")
        self.done: list[tuple[float, float, tuple[str, ...], int]] = []  # from, to, words, exit status
        self.texts: list[str] = []
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> Operator:
        self._thread.start()
        return self

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                words = tuple(next(self._acts))
                begun = time.monotonic()
                done = self._host.run(*words, timeout=120)
                self.done.append((begun, time.monotonic(), words, done.returncode))
                self.texts.append(f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}")
                assert done.returncode in {0, 1, 3}, self.texts[-1]
                assert "Traceback" not in done.stderr, self.texts[-1]
                self._over.wait(self._source.uniform(*self._pause))
        except BaseException as error:
            self._failure = error

    def end(self) -> None:
        self._over.set()
        self._thread.join(150)
        if self._failure is not None:
            raise AssertionError("an operator has failed") from self._failure


_FORCED = ("--force", "--yes", "--wait", "5s")
_REASON = ("--reason", "a test")


def mover(batch: Path) -> Iterator[Sequence[str]]:
    """Move a batch there and back."""
    while True:
        yield "move", "--file", str(batch), "--to", "new", *_FORCED, "--note", "a test"
        yield "move", "--file", str(batch), "--back", *_FORCED, "--note", "a test"


def decider(seed: int) -> Iterator[Sequence[str]]:
    """Decide who answers on the routes, and take decisions back, whoever made them."""
    source = random.Random(f"decisions {seed}")
    acts: list[Callable[[], Sequence[str]]] = [
        lambda: ("promote", source.choice("ab"), "--route", "pair", "--now", *_FORCED, *_REASON),
        lambda: ("promote", source.choice("abc"), "--route", "trio", *_FORCED, *_REASON),
        lambda: (
            "route",
            "weight",
            "balanced",
            f"a={source.randrange(4)}",
            f"c={source.randrange(1, 4)}",
            "--now",
            "--yes",
            "--wait",
            "5s",
        ),
        lambda: (
            "route",
            "reset",
            source.choice(("pair", "trio", "balanced", "shop")),
            "--now",
            "--yes",
            "--wait",
            "5s",
        ),
        lambda: ("promote", source.choice(("shop", "archive")), "--route", "shop", "--now", *_FORCED, *_REASON),
        lambda: ("promote", source.choice(("old", "new")), "--now", *_FORCED, *_REASON),
        lambda: ("undo", "--now", "--yes", "--wait", "5s", *_REASON),
        lambda: ("undo", "--yes", "--wait", "5s", *_REASON),
    ]
    while True:
        yield source.choice(acts)()
