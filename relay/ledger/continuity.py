"""Detects that Redis came back with another ledger, and keeps the index of destinations complete.

Redis may come back empty (a lost volume, FLUSHALL) or older (a restored backup, a replica that was behind). A ledger
has an identity and a count that only grows; each process remembers both, and the supervisor keeps them in the state
folder, so that a change is also found at the next start. It is reported once in the log, in /readyz and as a metric,
and the ledger gets a new identity: copies accepted before may be repeated, and are logged as such.

Registration is repeated once an hour and whenever the index of lists is incomplete: all lists are found by their keys,
and a destination that is no longer defined is defined again by the state folder or by its own name (host:port). If
neither works, it gets port 0; `queue move` can move its copies. A state folder that cannot be read or written is
ignored; a failed write is logged.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from redis import Redis

from relay import maillog, private_files
from relay.ledger import changes, keys
from relay.ledger.changes import Pipe
from relay.mail.destination import Destination
from relay.mail.ids import text as as_text
from relay.mail.stored import parsed

_SAID = {
    "emptied": "the ledger in Redis is gone: copies accepted before are lost, unless they are in the spool or Redis is "
    "given its data back",
    "replaced": "the ledger in Redis is another than before: copies accepted before are lost, unless Redis is given "
    "its data back; what is in it now may go out again",
    "older": "the ledger in Redis is older than it was: copies accepted since are lost, those delivered since go out "
    "again, logged as may repeat",
}
_SCANNED = 1000  # keys at once
_CONFIRM_MILLISECONDS = 200  # the next look asks again
_SERVER = re.compile(r"\[?([\w.:-]+?)\]?:(\d{1,5})")  # host:port, the default name of a destination
_NAME = re.compile(r"[A-Za-z0-9._:\[\]-]{1,100}")
NO_PORT = 0  # of a destination whose server is unknown


def warning(cause: str) -> str:
    """Return the warning for a discontinuity of the ledger."""
    return _SAID.get(cause, _SAID["replaced"])


class Continuity:
    """The identity and count of the ledger as this process knows them; ``state_dir`` keeps them over a restart.

    With ``replicas``, a count is remembered only once so many replicas have it: a failover may lose later counts, and
    no accepted message depends on those.
    """

    def __init__(
        self, destinations: Sequence[Destination], state_dir: Path | None = None, *, replicas: int = 0
    ) -> None:
        self.changes = 0  # how often the ledger has changed so that staged messages may be missing
        self._replicas = replicas
        self._configured = {d.name: d.to_json() for d in destinations}
        self._path = state_dir.absolute() / "ledger.json" if state_dir else None
        self._identity, self._count = "", 0
        self._defined: dict[str, str] = {}  # name -> definition, of all destinations ever known
        self._written = ""
        self._is_told = False  # the log has been told that the state folder cannot be written
        if self._path:
            self._read(self._path)
        self._defined |= self._configured

    # Asking, in a pipeline

    @property
    def answers(self) -> int:
        """The number of replies that the commands of ``ask`` get."""
        return 2 if self._replicas else 1

    def ask(self, pipe: Pipe, *, count_on: bool) -> None:
        """Add the commands to a pipeline; ``count_on``: increment the count, since something has been written."""
        changes.is_known(pipe, self._identity, self._count, secrets.token_hex(8), count_on=count_on)
        if self._replicas:
            pipe.wait(self._replicas, _CONFIRM_MILLISECONDS)

    def judge(self, answers: Sequence[Any]) -> bool:
        """Evaluate the replies and report a change of the ledger; returns whether ``register`` must be called."""
        (identity, count, cause, is_whole, last), *confirmed = answers
        changed = self._identity != _text(identity)
        if changed or not self._replicas or (isinstance(confirmed[0], int) and confirmed[0] >= self._replicas):
            self._count = int(count)
        # Replicas confirm staged messages, but not a worker's claims, so a failover may lose only the latter.
        if changed and self._identity and not (self._replicas and as_text(last) == "older"):
            self.changes += 1
        self._identity = _text(identity)
        if cause:
            maillog.notice("error", warning(as_text(cause)), cause=as_text(cause))
        return changed or not is_whole

    # All of it, for who has a connection and time

    def look(self, connection: Redis) -> bool:
        """Ask, register the destinations if needed, and remember; returns whether it registered. Raises RedisError."""
        with connection.pipeline(transaction=False) as pipe:
            self.ask(pipe, count_on=True)
            pipe.hgetall(keys.DESTINATIONS)
            *answers, known = pipe.execute()
        must = self.judge(answers) or any(name.encode() not in known for name in self._configured)
        self._defined |= {_text(name): _text(text) for name, text in known.items()}
        if must:
            register(connection, self._defined, self._configured)
        self._write()
        return must

    def register(self, connection: Redis) -> list[str]:
        """Register all destinations in the ledger; returns those that were not defined. Raises RedisError."""
        return register(connection, self._defined, self._configured)

    # In the state folder

    def _read(self, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = parsed(private_files.read(path.parent, path.name))
            self._identity, self._count = str(found["identity"]), int(found["count"])
            self._defined = {name: str(text) for name, text in found["destinations"].items()}

    def _write(self) -> None:
        if self._path is None:
            return
        found = {"identity": self._identity, "count": self._count, "destinations": self._defined}
        text = json.dumps(found, indent=1)
        if text == self._written:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            data = text.encode("utf-8", "surrogateescape")
            private_files.write(self._path.parent, self._path.name, data, durable=False)
        except OSError as error:
            if not self._is_told:
                reason = f"the ledger cannot be remembered: {error.strerror}"
                maillog.notice("warning", reason, file=str(self._path))
            self._is_told = True
        else:
            self._written, self._is_told = text, False


def register(connection: Redis, defined: Mapping[str, str], configured: Mapping[str, str] | None = None) -> list[str]:
    """Define the configured destinations and all that have a list; returns those that were not defined.

    May be repeated and run by several processes at once. Raises RedisError.
    """
    named = set(_listed(connection))
    with connection.pipeline(transaction=True) as pipe:
        pipe.hkeys(keys.DESTINATIONS)
        pipe.smembers(keys.LISTS)
        known, indexed = cast("tuple[list[bytes], set[bytes]]", pipe.execute())
    named |= {_text(name) for name in (*known, *indexed)} | set(configured or ())
    there = {_text(name) for name in known}
    missing = sorted(name for name in named - there if _NAME.fullmatch(name))
    with connection.pipeline(transaction=True) as pipe:
        for name in missing:
            pipe.hsetnx(keys.DESTINATIONS, name, _definition(name, defined))
        if configured:
            pipe.hset(keys.DESTINATIONS, mapping=cast("Mapping[Any, Any]", configured))
        # This comes last: it marks the index as complete.
        pipe.sadd(keys.LISTS, *(name.encode("utf-8", "surrogateescape") for name in named), b"")
        pipe.execute()
    found = [name for name in missing if name not in (configured or ())]
    for name in found:
        how = "as before" if name in defined else "by its name" if _by_its_name(name).port else "queue move its copies"
        maillog.notice("warning", "copies of a destination that the ledger did not know", destination=name, defined=how)
    return found


def forget_kept(connection: Redis) -> int:
    """Delete bodies that were kept while the index of lists was incomplete, if no list contains them.

    Returns their number. Raises RedisError.
    """
    count = 0
    while ids := cast("list[bytes]", connection.srandmember(keys.KEPT, _SCANNED)):
        with connection.pipeline(transaction=True) as pipe:
            pipe.sismember(keys.LISTS, "")
            changes.purge(pipe, [as_text(message_id) for message_id in ids])
            is_whole, purged = pipe.execute()
        if not is_whole:
            break
        connection.srem(keys.KEPT, *ids)
        count += purged
    return count


def _listed(connection: Redis) -> Iterable[str]:
    """Yield the destinations that have a list, found by its key."""
    for key in connection.scan_iter(match=keys.PREFIX + "[pf]*", count=_SCANNED):
        text = _text(cast("bytes", key))
        for kind in (keys.PENDING, keys.FAILED):
            if text.startswith(kind):
                yield text.removeprefix(kind)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _definition(name: str, defined: Mapping[str, str]) -> str:
    """Return the stored form of a destination: the one defined before, else one derived from its name."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        return Destination.from_json(defined[name]).to_json()
    return _by_its_name(name).to_json()


def _by_its_name(name: str) -> Destination:
    found = _SERVER.fullmatch(name)
    return Destination(name, found[1], int(found[2])) if found else Destination(name, "", NO_PORT)
