"""Questions from one host to the others, and their answers: lists in Redis that nobody needs for long.

Who asks puts the question in each host's list and waits at a list of its own; an answer comes in parts, of which the
last one says so. Where mail is sealed (storage.key_file), so are both. Nobody is trusted: a part that makes no sense is
none. Raises RedisError.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from relay.ledger import keys
from relay.mail import encryption
from relay.mail.ids import text
from relay.mail.stored import parsed
from relay.redisio.blocking import Blocking

_QUESTION_SECONDS = 10  # after which nobody waits for its answer any more
_ANSWER_SECONDS = 30
_MOST = 8 << 20  # octets of a question or of a part
_END = "end"


class Question(NamedTuple):
    """What a host is asked, and where it answers."""

    asked: dict[str, Any]
    reply_to: str


def ask(connection: Any, places: Iterable[str], asked: dict[str, Any]) -> str:
    """Ask the hosts at these places; returns where they answer."""
    reply_to = os.urandom(12).hex()
    data = _packed(keys.ASK, {"asked": asked, "reply": reply_to})
    with connection.pipeline(transaction=False) as pipe:
        for place in places:
            pipe.rpush(keys.ASK + place, data)
            pipe.expire(keys.ASK + place, _QUESTION_SECONDS)
        pipe.execute()
    return reply_to


def answers(
    connection: Any, reply_to: str, places: Iterable[str], seconds: float, *, for_each: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield (place, part of its answer), and (place, None) at its end, until all are done or the time is over.

    ``for_each``: that is the time for the next part of anybody's.
    """
    missing, key = set(places), keys.ANSWER + reply_to
    deadline = time.monotonic() + seconds
    while missing and (left := deadline - time.monotonic()) > 0:
        found = connection.blpop([key], timeout=max(0.05, left))
        part = _unpacked(keys.ANSWER, found[1]) if found else None
        place = part.get("place") if part else None
        if not part or not isinstance(place, str) or place not in missing:
            continue
        if for_each:
            deadline = time.monotonic() + seconds
        if part.get("part") is not None:
            yield place, part["part"]
        if part.get(_END) is True:
            missing.discard(place)
            yield place, None
    connection.delete(key)


def next_question(waiting: Blocking, place: str, seconds: float) -> Question | None:
    """Wait for a question to the host at this place; None where none came, or it makes no sense."""
    found = waiting.execute("BLPOP", keys.ASK + place, seconds)
    content = _unpacked(keys.ASK, found[1]) if found else None
    if not content:
        return None
    asked, reply_to = content.get("asked"), content.get("reply")
    if not isinstance(asked, dict) or not isinstance(reply_to, str) or len(reply_to) > 64 or not reply_to.isalnum():
        return None
    return Question(asked, reply_to)


def answer(connection: Any, question: Question, place: str, parts: Iterable[Any]) -> None:
    """Answer a question in parts, and say that it is all."""
    key = keys.ANSWER + question.reply_to
    for content in (*({"part": part} for part in parts), {_END: True}):
        with connection.pipeline(transaction=False) as pipe:
            pipe.rpush(key, _packed(keys.ANSWER, {"place": place, **content}))
            pipe.expire(key, _ANSWER_SECONDS)
            pipe.execute()


def _packed(kind: str, content: dict[str, Any]) -> str:
    data = json.dumps(content, separators=(",", ":"))
    return encryption.seal_word(kind, data) if encryption.is_on() else data


def _unpacked(kind: str, data: bytes | str) -> dict[str, Any] | None:
    if len(data) > _MOST:
        return None
    try:
        found = parsed(text(data) if data[:1] in {b"{", "{"} else encryption.open_word(kind, data))
    except (ValueError, encryption.MissingKey):
        return None
    return found if isinstance(found, dict) else None
