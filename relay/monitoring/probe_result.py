"""What a probe found out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe found out about one subject: "redis", "redis appendonly", "primary", "backup new"."""

    subject: str
    ok: bool
    text: str
