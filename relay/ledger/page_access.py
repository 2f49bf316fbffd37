"""Who is logged in to the page, and the links that let in once: what of it is in Redis.

A token of 256 bit is with the browser only; the key has its digest, so that who reads Redis cannot take its place. A
session ends after 8 hours, or 30 minutes without a request; a link after 60 seconds. What is read back is data: a value
that makes no sense is no session. Times are Redis's, so that all hosts agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis import Redis

from relay import maillog
from relay.ledger import keys
from relay.ledger.redis_clock import time_of
from relay.mail.stored import LATEST, parsed_object

VIEWER, OPERATOR = "viewer", "operator"
ROLES = (VIEWER, OPERATOR)
SESSION_SECONDS = 8 * 3600
IDLE_SECONDS = 30 * 60
LINK_SECONDS = 60

_VERSION = 1
_TOUCH_SECONDS = 60  # a session is noted as used at most so often
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_CSRF = re.compile(r"[A-Za-z0-9_-]{22}")
_MARK = re.compile(r"[0-9a-f]{0,64}")
_LONGEST = 4096  # octets of a stored value


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is logged in. ``mark`` stands for the password's hash, "" where a link has let in."""

    name: str
    role: str
    mark: str
    csrf: str  # what the session's forms carry
    begun: float


def make_link(connection: Redis, name: str, role: str) -> str:
    """Return the token of a new link for who gives a command. Raises RedisError."""
    token = secrets.token_urlsafe(32)
    value = json.dumps({"v": _VERSION, "name": name, "role": role})
    connection.set(_key(keys.PAGE_LINK, token), value, ex=LINK_SECONDS)
    return token


async def take_link(client: redis.asyncio.Redis, token: str) -> tuple[str, str] | None:
    """Return name and role of a link that was not taken before, None if there is none. Raises RedisError."""
    if not _TOKEN.fullmatch(token):
        return None
    found = _read(await client.getdel(_key(keys.PAGE_LINK, token)))
    if found is None or not _is_somebody(found):
        return None
    return found["name"], found["role"]


async def begin(client: redis.asyncio.Redis, name: str, role: str, mark: str = "") -> tuple[str, Session]:
    """Begin a session: returns its token. Raises RedisError."""
    token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(16)
    now = time_of(await client.time())
    session = Session(name, role, mark, csrf, now)
    value = {"v": _VERSION, "name": name, "role": role, "mark": mark, "csrf": csrf, "begun": now}
    await client.set(_key(keys.PAGE_SESSION, token), json.dumps(value), ex=IDLE_SECONDS)
    return token, session


async def find(client: redis.asyncio.Redis, token: str, *, is_used: bool = True) -> Session | None:
    """Return the session of a token, None if there is none. Raises RedisError.

    ``is_used``: this is a request of somebody; without, the session goes on becoming idle.
    """
    if not _TOKEN.fullmatch(token):
        return None
    key = _key(keys.PAGE_SESSION, token)
    async with client.pipeline(transaction=False) as pipe:
        pipe.time()
        pipe.get(key)
        pipe.ttl(key)
        answers: list[Any] = await pipe.execute()
    session, now, ttl = _session(answers[1]), time_of(answers[0]), int(answers[2])
    if session is None:
        return None
    left = session.begun + SESSION_SECONDS - now
    if not 0 < left <= SESSION_SECONDS + _TOUCH_SECONDS:
        await client.delete(key)
        return None
    if (is_used and ttl <= IDLE_SECONDS - _TOUCH_SECONDS) or ttl < 0 or ttl > left + 1:
        await client.expire(key, min(IDLE_SECONDS, math.ceil(left)))
    return session


async def end(client: redis.asyncio.Redis, token: str) -> None:
    """End a session. Raises RedisError."""
    if _TOKEN.fullmatch(token):
        await client.delete(_key(keys.PAGE_SESSION, token))


def _key(prefix: str, token: str) -> str:
    return prefix + hashlib.sha256(token.encode("ascii")).hexdigest()


def _session(value: bytes | str | None) -> Session | None:
    found = _read(value)
    if found is None or not _is_somebody(found):
        return None
    mark, csrf, begun = found.get("mark"), found.get("csrf"), found.get("begun")
    if not (isinstance(mark, str) and _MARK.fullmatch(mark) and isinstance(csrf, str) and _CSRF.fullmatch(csrf)):
        _tell()
        return None
    if isinstance(begun, bool) or not isinstance(begun, int | float) or not abs(begun) < LATEST:
        _tell()
        return None
    return Session(found["name"], found["role"], mark, csrf, begun)


def _read(value: bytes | str | None) -> dict[str, Any] | None:
    if value is None:
        return None
    found = parsed_object(value) if len(value) <= _LONGEST else None
    if found is None or found.get("v") != _VERSION:
        _tell()
        return None
    return found


def _is_somebody(found: dict[str, Any]) -> bool:
    name = found.get("name")
    is_one = isinstance(name, str) and 0 < len(name) <= 256 and name.isprintable() and found.get("role") in ROLES
    if not is_one:
        _tell()
    return is_one


def _tell() -> None:
    """Say that a value makes no sense: it lets nobody in."""
    maillog.notice("warning", "a session of the page in Redis makes no sense: it is ignored")
