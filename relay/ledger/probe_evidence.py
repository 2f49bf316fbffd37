"""What a probe of a server's recipients has found, in numbers and a few names: the evidence of `ready`.

A probe asks whether those exist there who are in a list (LISTED), or whom the primary has taken (SEEN), or whether it
takes those whom the primary has refused (REFUSALS), of all mail or of one route. The last result of each is kept: one
of a few recipients that had mail does not hide whom a list has shown to be missing. Names are sealed where mail is
(storage.key_file). What is read back is data; what makes no sense is evidence of nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay.ledger import keys
from relay.mail import encryption
from relay.mail.ids import is_route_name
from relay.mail.stored import LARGEST, LATEST, any_text, number, parsed
from relay.mail.text import printable

LISTED, SEEN, REFUSALS = WHATS = ("listed", "seen", "refused")
MOST_EXAMPLES = 20
_CUT = 400  # characters of a text
_LONGEST = 64 << 10  # octets of a stored form
_SLACK = 60.0  # seconds that a moment may be in the future: a clock was set
_COUNTS = ("exist", "missing", "refused", "put_off", "untold", "left")


@dataclass(frozen=True, slots=True)
class ProbeEvidence:
    """How many recipients were ``asked`` about, what was said, and of how many domains it takes anybody (``open``).

    ``at`` is seconds since the epoch by Redis's clock. ``left`` were not asked, since it ended early, and ``why``.
    ``accepted`` is how many RCPT were, whatever that says; ``examples`` are of those that should be otherwise, and
    ``reply`` is what was said to one that was refused for another reason than that it does not exist.
    """

    at: float
    by: str
    source: str
    exist: int = 0
    missing: int = 0
    refused: int = 0
    put_off: int = 0
    untold: int = 0
    left: int = 0
    accepted: int = 0
    domains: int = 0
    open_domains: int = 0
    why: str = ""
    reply: str = ""
    examples: tuple[str, ...] = ()

    @property
    def asked(self) -> int:
        """How many it was to ask about."""
        return self.exist + self.missing + self.refused + self.put_off + self.untold + self.left


def tell(pipe: Any, destination: str, what: str, route: str, found: ProbeEvidence) -> None:
    """Keep what a probe has found, of one route or ("") of all mail."""
    said: Any = {
        "why": _cut(found.why),
        "reply": _cut(found.reply),
        "examples": [_cut(name) for name in found.examples[:MOST_EXAMPLES]],
    }
    if encryption.is_on():  # the words of a server may name people, too
        said = encryption.seal_word(_place(destination), json.dumps(said))
    words = {
        "at": round(found.at, 3),
        "by": _cut(found.by),
        "source": _cut(found.source),
        **{name: getattr(found, name) for name in (*_COUNTS, "accepted", "domains", "open_domains")},
        "said": said,
    }
    pipe.hset(keys.PROBED + destination, f"{what} {route}".rstrip(), json.dumps(words))


def read(connection: Any, destination: str, route: str, now: float) -> dict[str, ProbeEvidence]:
    """Return the last evidence of each kind: of a route's own probe or of one of all mail, whichever is newer."""
    pipe = connection.pipeline(transaction=False)
    fields = {what: [what, *([f"{what} {route}"] if is_route_name(route) else [])] for what in WHATS}
    for names in fields.values():
        pipe.hmget(keys.PROBED + destination, names)
    found: dict[str, ProbeEvidence] = {}
    for what, answer in zip(fields, pipe.execute(raise_on_error=False), strict=True):
        if isinstance(answer, list):  # else another type of key: there is none
            known = [one for one in (_read(data, destination, now) for data in answer) if one]
            if known:
                found[what] = max(known, key=lambda one: one.at)
    return found


def _read(data: object, destination: str, now: float) -> ProbeEvidence | None:
    if not isinstance(data, bytes | str) or len(data) > _LONGEST:
        return None
    try:
        found: Mapping[str, Any] = parsed(data)
        said = _opened(found["said"], destination)
        counts = {name: _count(found[name]) for name in (*_COUNTS, "accepted", "domains", "open_domains")}
        made = ProbeEvidence(
            at=number(found["at"]),
            by=_text(found["by"]),
            source=_text(found["source"]),
            **counts,
            why=_text(said["why"]),
            reply=_text(said["reply"]),
            examples=tuple(map(_text, said["examples"][:MOST_EXAMPLES])),
        )
    except (ValueError, TypeError, KeyError):
        return None
    is_sound = 0 < made.at <= min(LATEST, now + _SLACK)
    is_sound &= made.accepted <= made.asked - made.left and made.open_domains <= made.domains <= made.asked
    return made if is_sound else None


def _opened(stored: Any, destination: str) -> Any:
    """Return what was said; nothing where its key is not here."""
    if not isinstance(stored, str):
        return stored
    try:
        return parsed(encryption.open_word(_place(destination), stored))
    except encryption.MissingKey:
        return {"why": "", "reply": "", "examples": []}


def _place(destination: str) -> str:
    return f"probed {destination}"


def _count(value: object) -> int:
    found = number(value)
    if not 0 <= found <= LARGEST or found != int(found):
        raise ValueError("no count")
    return int(found)


def _cut(value: str) -> str:
    return printable(value)[:_CUT]


def _text(value: object) -> str:
    return _cut(any_text(value))
