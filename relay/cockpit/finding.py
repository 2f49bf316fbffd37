"""What a criterion comes to: pass, fail, warn or unknown, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Result(Enum):
    """What a criterion came to; ``blocks`` says whether a backup with it is not ready."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"

    @property
    def blocks(self) -> bool:
        return self in {Result.FAIL, Result.UNKNOWN}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one criterion came to, in a line for people."""

    result: Result
    text: str


def passes(text: str) -> Finding:
    """Return that all is well."""
    return Finding(Result.PASS, text)


def fails(text: str) -> Finding:
    """Return that it is not."""
    return Finding(Result.FAIL, text)


def warns(text: str) -> Finding:
    """Return that it is worth a look."""
    return Finding(Result.WARN, text)


def unknown(text: str) -> Finding:
    """Return that nobody can tell, and how to find out."""
    return Finding(Result.UNKNOWN, text)
