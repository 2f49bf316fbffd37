"""Is a backup ready to be the primary? The verdict over all criteria on what is known (evidence_from_redis.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relay.cockpit.criteria import CRITERIA, Criterion
from relay.cockpit.evidence import Evidence
from relay.cockpit.evidence_from_redis import gather
from relay.cockpit.finding import Finding, Result
from relay.cockpit.roles_now import by_default
from relay.config.model import Settings


@dataclass(frozen=True, slots=True)
class Judged:
    """A criterion and what it came to."""

    criterion: Criterion
    finding: Finding

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        criterion = self.criterion
        return {
            "number": criterion.number,
            "criterion": criterion.name,
            "result": self.finding.result.value,
            "text": self.finding.text,
            "age_s": self.finding.age,
            "rule": criterion.rule,
            "settings": list(criterion.settings),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a backup is ready to take the place of the primary ``old``, by which criteria, at the moment ``at``."""

    name: str
    old: str
    at: float
    judged: Sequence[Judged]

    def having(self, result: Result) -> list[Judged]:
        """Return the criteria that came to this."""
        return [j for j in self.judged if j.finding.result is result]

    @property
    def is_ready(self) -> bool:
        """Whether no criterion fails, and none is unknown."""
        return not any(j.finding.result.blocks for j in self.judged)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        counts = ((Result.FAIL, "fails", "fail"), (Result.UNKNOWN, "unknown", "unknown"))
        parts = [f"{n} {one if n == 1 else many}" for r, one, many in counts if (n := len(self.having(r)))]
        warnings = len(self.having(Result.WARN))
        if self.is_ready:
            parts = [f"{len(self.judged)} criteria"]
        if warnings:
            parts.append("1 warning" if warnings == 1 else f"{warnings} warnings")
        return f"{'READY' if self.is_ready else 'NOT READY'}: {', '.join(parts)}"

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "destination": self.name,
            "primary": self.old,
            "ready": self.is_ready,
            "at": self.at,
            "summary": self.summary,
            "criteria": [j.as_object() for j in self.judged],
        }


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict on what is known."""
    found = [(criterion, criterion.judge(evidence)) for criterion in CRITERIA]
    judged = tuple(Judged(criterion, finding) for criterion, finding in found if finding is not None)
    return Verdict(evidence.name, evidence.old, evidence.now, judged)


def verdict(
    connection: Any, settings: Settings, name: str, old: str = "", compared: Sequence[str] = (), route: str = ""
) -> Verdict:
    """Ask about one backup, beside the primary or whom ``old`` names. Raises UnknownBackup, RedisError."""
    return judge(gather(connection, settings, name, old, compared, route))


def verdicts(connection: Any, settings: Settings) -> list[Verdict]:
    """Ask about every backup that there is now. Raises RedisError."""
    return [verdict(connection, settings, name) for name in by_default(connection, settings)[1]]
