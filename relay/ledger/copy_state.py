"""What is known of a copy that did not go through at its first try, and its stored form."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

_HISTORY = 20  # attempts kept per copy


class Attempt(NamedTuple):
    """One try of one copy: seconds since the epoch, and the reply or the trouble."""

    at: float
    reply: str


@dataclass(frozen=True, slots=True)
class CopyState:
    """What is known of a copy that did not go through at its first try.

    ``owed`` indexes the envelope's recipients; None means all. ``tries`` counts since ``since``, the time at which
    the clock of the retry schedule started; ``attempts`` counts for ever. ``job`` is the RQ job that owns
    the copy: no other may claim it.
    """

    job: str = ""
    attempts: int = 0
    tries: int = 0
    since: float = 0.0
    owed: tuple[int, ...] | None = None
    history: tuple[Attempt, ...] = ()

    @property
    def last_reply(self) -> str:
        return self.history[-1].reply if self.history else ""

    def tried(self, at: float, reply: str) -> CopyState:
        """Return the state after one more attempt that ended with this reply."""
        history = (*self.history, Attempt(round(at, 3), reply))[-_HISTORY:]
        return replace(self, attempts=self.attempts + 1, tries=self.tries + 1, history=history)

    def to_wire(self) -> str:
        """Return the stored form: the job id, a newline (Lua reads only that far), JSON."""
        record: dict[str, Any] = {"a": self.attempts, "t": self.tries, "s": round(self.since, 3)}
        if self.owed is not None:
            record["o"] = self.owed
        if self.history:
            record["h"] = self.history
        return f"{self.job}\n{json.dumps(record, separators=(',', ':'))}"

    @classmethod
    def from_wire(cls, data: str | bytes | None) -> CopyState:
        """Read the stored form; nothing stored is a copy without history."""
        if not data:
            return _FRESH
        job, _, text = (data.decode() if isinstance(data, bytes) else data).partition("\n")
        record = json.loads(text)
        return cls(
            job=job,
            attempts=record["a"],
            tries=record["t"],
            since=record["s"],
            owed=tuple(record["o"]) if "o" in record else None,
            history=tuple(Attempt(at, reply) for at, reply in record.get("h", ())),
        )


_FRESH = CopyState()  # frozen: one is enough for all that have no history
