"""Questions to the operator at the terminal; without a terminal, the command line must answer them (--yes)."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from relay.command.exit_status import Misuse


def require_somebody() -> None:
    """Raise Misuse if there is no terminal."""
    if not sys.stdin or not sys.stdin.isatty():
        raise Misuse("nobody to ask: say --yes")


def _answer(question: str) -> str:
    """Ask at the terminal. Raises Misuse without one."""
    require_somebody()
    sys.stderr.write(question)
    sys.stderr.flush()
    return sys.stdin.readline().strip()


def ask(question: str) -> bool:
    """Ask at the terminal; returns whether the answer is yes. Raises Misuse without a terminal."""
    return _answer(f"{question} [y/N] ").lower() in {"y", "yes"}


_MANY = 100  # for more, the number must be typed instead of "y"


def ask_for(count: int, action: str, lines: Iterable[str]) -> bool:
    """Ask before something is done to so many copies: above a hundred the number must be typed. Raises Misuse."""
    require_somebody()
    sys.stderr.writelines(f"{line}\n" for line in lines)
    if count <= _MANY:
        return ask(f"{action}?")
    return _answer(f"{action}? Type the number: ") == str(count)


def ask_for_word(word: str, question: str) -> bool:
    """Have a word typed, for what must not happen by a slip of the hand. Raises Misuse where nobody is there."""
    return _answer(f"{question}: ") == word
