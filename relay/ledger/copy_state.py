"""The state of a copy that was not delivered at its first try (attempts, owed recipients), and its stored form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from relay.mail.ids import is_job_id, text
from relay.mail.stored import LATEST, any_text, number, parsed

_HISTORY = 20  # attempts kept per copy
REPLY = 1000  # characters of a reply that are kept
_LONGEST = 1 << 20  # characters; a longer stored form is not parsed
_MOST = 1 << 31  # the highest plausible count
UNREADABLE = "what Redis held of earlier attempts cannot be read: everybody is owed this copy"


# Groups of divergence (see divergence.py), each with its kind's letter in front, and the recipients counted in it.
Groups = tuple[tuple[str, tuple[int, ...]], ...]
_GROUP = re.compile(r"[a-z][0-9a-f]{12}")
_MOST_PAST = 20  # groups that a copy has left and is not counted in again: a reply that never repeats fills no state


class Attempt(NamedTuple):
    """One try of one copy: seconds since the epoch, and the reply or the trouble."""

    at: float
    reply: str


@dataclass(frozen=True, slots=True)
class CopyState:
    """The state of a copy that was not delivered at its first try.

    ``owed`` holds indices of the envelope's recipients; None means all. ``tries`` counts since ``since``, the time at
    which the retry schedule started; ``attempts`` counts for ever. ``job`` is the RQ job that owns the copy: no other
    job may claim it. ``open`` says which recipients are counted in which group of divergence now, ``past`` which were
    before.
    """

    job: str = ""
    attempts: int = 0
    tries: int = 0
    since: float = 0.0
    owed: tuple[int, ...] | None = None
    history: tuple[Attempt, ...] = ()
    open: Groups = ()
    past: Groups = ()

    @property
    def last_reply(self) -> str:
        return self.history[-1].reply if self.history else ""

    def tried(self, at: float, reply: str) -> CopyState:
        """Return the state after one more attempt that ended with this reply."""
        history = (*self.history, Attempt(round(at, 3), reply[:REPLY]))[-_HISTORY:]
        return replace(self, attempts=self.attempts + 1, tries=self.tries + 1, history=history)

    def owed_by(self, recipients: Iterable[int]) -> CopyState:
        """Return the state of these recipients' part of the copy."""
        owed = tuple(sorted(recipients))
        return replace(self, owed=owed, open=_of(self.open, owed), past=_of(self.past, owed))

    def to_wire(self) -> str:
        """Return the stored form: the job id, a newline (Lua reads only that far), JSON."""
        record: dict[str, Any] = {"a": self.attempts, "t": self.tries, "s": round(self.since, 3)}
        if self.owed is not None:
            record["o"] = self.owed
        if self.history:
            record["h"] = self.history
        if self.open:
            record["g"] = dict(self.open)
        if self.past:
            record["q"] = dict(self.past[-_MOST_PAST:])
        return f"{self.job}\n{json.dumps(record, separators=(',', ':'))}"

    @classmethod
    def from_wire(cls, data: str | bytes | None) -> CopyState:
        """Read the stored form; None is a copy without history. Never raises.

        An unreadable form becomes a state with all recipients owed and one attempt that says so.
        """
        if not data:
            return FRESH
        job, _, record = text(data).partition("\n")
        job = job if is_job_id(job) else ""
        try:
            return cls(job, **_fields(record))
        except (ValueError, KeyError, TypeError, AttributeError):
            return cls(job, history=(Attempt(0.0, UNREADABLE),))


def _fields(record: str) -> dict[str, Any]:
    if len(record) > _LONGEST:
        raise ValueError("too long")
    found = parsed(record)
    # Lua writes an empty list as {}.
    owed, history = (found[key] or [] if key in found else None for key in ("o", "h"))
    if not isinstance(owed, list | None) or not isinstance(history, list | None):
        raise TypeError("no list")
    return {
        "attempts": _count(found["a"]),
        "tries": _count(found["t"]),
        "since": _time(found["s"]),
        "owed": None if owed is None else tuple(dict.fromkeys(map(_count, owed))),
        "open": _groups(found.get("g")),
        "past": _groups(found.get("q")),
        "history": tuple(Attempt(_time(at), any_text(reply)[:REPLY]) for at, reply in (history or [])[-_HISTORY:]),
    }


def _of(groups: Groups, recipients: tuple[int, ...]) -> Groups:
    wanted = set(recipients)
    found = ((group, tuple(i for i in counted if i in wanted)) for group, counted in groups)
    return tuple((group, counted) for group, counted in found if counted)


def _groups(found: object) -> Groups:
    """Read which recipients are counted in which group; an invalid form counts as none."""
    if not isinstance(found, dict):
        return ()
    try:
        groups = ((key, tuple(dict.fromkeys(map(_count, counted or ())))) for key, counted in found.items())
        return tuple((key, counted) for key, counted in groups if counted and _GROUP.fullmatch(key))
    except (ValueError, TypeError):
        return ()


def _count(value: object) -> int:
    found = number(value)
    if not 0 <= found < _MOST or found != int(found):
        raise ValueError("not a count")
    return int(found)


def _time(value: object) -> float:
    found = number(value)
    if not 0 <= found < LATEST:
        raise ValueError("not a time")
    return found


FRESH = CopyState()  # frozen: one is enough for all that have no history
