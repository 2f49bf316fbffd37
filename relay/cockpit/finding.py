"""What a criterion comes to: pass, fail, warn or unknown, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial


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
    """What one criterion came to, in a line for people; ``age``, seconds, of evidence that goes stale."""

    result: Result
    text: str
    age: float | None = None


passes = partial(Finding, Result.PASS)
fails = partial(Finding, Result.FAIL)
warns = partial(Finding, Result.WARN)  # it is worth a look
unknown = partial(Finding, Result.UNKNOWN)  # nobody can tell; the text says how to find out
