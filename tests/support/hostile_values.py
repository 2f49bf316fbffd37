"""Values that whoever can write to Redis could put in place of any of ours, by type of key and structure of the value.

``variants`` yields ways to spoil one key: as another type of key; with each raw value in place of each of its parts;
with each odd value in place of each part of the JSON that a part of it holds. The order is the same at every call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import redis

# What must never reach a terminal; names of files; numbers that are none; more than anybody expects.
RAW = (
    b"",
    b"\xff\xfe\0\xc3(",
    b"\x1b]0;owned\x07\x1b[2J\x1b[31m\r\nsecond line\0\xe2\x80\xae",
    b"../../../../outside/decoy",
    b"/etc/passwd",
    b"..",
    b"-1",
    b"9" * 400,
    b"1e999",
    b"nan",
    b"inf",
    b"[" * 100_000,
    b'{"at":' * 50_000,
    b'"\\ud800"',
    b"{}",
    b"[]",
    b"null",
    b"x" * 1_000_000,
)
LEAVES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1.5,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\x1b]0;owned\x07\x1b[2J\r\nsecond line\0\u202e",
    "\ud800",
    "../../../../outside/decoy",
    "x" * 100_000,
    [],
    {},
    [[]],
    {"\x1b[2J": [None]},
)
_SCORES = (float("inf"), float("-inf"), -1.0, 1e308, 0.0)

Spoil = Callable[[redis.Redis], object]


def variants(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    """Yield (what it is, the function that spoils the key); the key must exist when the first one is asked for."""
    kind = connection.type(key)
    yield from _other_types(key, kind)
    parts: dict[bytes, Callable[[redis.Redis, bytes], Iterator[tuple[str, Spoil]]]] = {
        b"string": _strings,
        b"hash": _hashes,
        b"zset": _zsets,
        b"set": _sets,
        b"list": _lists,
        b"stream": _streams,
    }
    yield from parts[kind](connection, key)


def _strings(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    for what, spoilt in _spoilt(connection.get(key) or b""):
        yield what, lambda c, v=spoilt: c.set(key, v)


def _hashes(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    fields = dict(list(connection.hgetall(key).items())[:12])
    yield "names", lambda c: c.hset(key, mapping=dict.fromkeys(RAW[:11], b"1"))
    for raw in RAW:
        yield f"raw {raw[:20]!r}", lambda c, v=raw: c.hset(key, mapping=dict.fromkeys(fields, v))
    for name, value in fields.items():
        for what, spoilt in _spoilt(value):
            if not what.startswith("raw"):
                yield f"{name[:30]!r} {what}", lambda c, n=name, v=spoilt: c.hset(key, n, v)


def _zsets(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    members = [member for member, _ in connection.zrange(key, 0, 4, withscores=True)]
    yield "members", lambda c: c.zadd(key, dict.fromkeys(RAW[:11], 1.0))
    for score in _SCORES:
        yield f"score {score}", lambda c, s=score: c.zadd(key, dict.fromkeys([*members, b"x y"], s))


def _sets(_: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    yield "members", lambda c: c.sadd(key, *RAW[:11])


def _lists(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    yield "raw", lambda c: c.lpush(key, *RAW)
    for what, spoilt in _spoilt(connection.lindex(key, 0) or b""):
        if not what.startswith("raw"):
            yield what, lambda c, v=spoilt: c.lpush(key, v)


def _streams(connection: redis.Redis, key: bytes) -> Iterator[tuple[str, Spoil]]:
    (_, fields), *_ = connection.xrevrange(key, count=1)
    for raw in RAW:
        yield f"raw {raw[:20]!r}", lambda c, v=raw: c.xadd(key, dict.fromkeys([*fields, b"\x1b[2J"], v))


def _other_types(key: bytes, kind: bytes) -> Iterator[tuple[str, Spoil]]:
    makers: dict[bytes, Spoil] = {
        b"string": lambda c: c.set(key, b"text"),
        b"hash": lambda c: c.hset(key, "a", "b"),
        b"list": lambda c: c.rpush(key, "a"),
        b"set": lambda c: c.sadd(key, "a"),
        b"zset": lambda c: c.zadd(key, {"a": 1}),
        b"stream": lambda c: c.xadd(key, {"a": "b"}),
    }
    for other, make in makers.items():
        if other != kind:
            yield f"a {other.decode()}", lambda c, m=make: (c.delete(key), m(c))


def _spoilt(value: bytes) -> Iterator[tuple[str, bytes]]:
    for raw in RAW:
        yield f"raw {raw[:20]!r}", raw
    # The state of a copy has the id of its job in front.
    front, _, rest = value.rpartition(b"\n") if b"\n" in value else (b"", b"", value)
    try:
        found = json.loads(rest)
    except ValueError:
        return
    for path in _paths(found):
        for leaf in LEAVES:
            spoilt = json.dumps(_put(found, path, leaf)).encode()
            yield f"{'.'.join(map(str, path))} = {str(leaf)[:20]!r}", (front + b"\n" if front else b"") + spoilt


def _paths(found: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(found, dict):
        for name, value in found.items():
            yield (name,)
            yield from ((name, *path) for path in _paths(value))
    elif isinstance(found, list):
        for n, value in enumerate(found[:3]):
            yield (n,)
            yield from ((n, *path) for path in _paths(value))


def _put(found: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    if not path:
        return leaf
    copy = dict(found) if isinstance(found, dict) else list(found)
    copy[path[0]] = _put(found[path[0]], path[1:], leaf)
    return copy
