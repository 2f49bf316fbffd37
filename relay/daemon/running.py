"""What a running smtp-dup runs with: a private file in the state folder, for the commands beside it.

With it `smtp-dup up --primary ... --backup ...` in one terminal and `smtp-dup queue summary` in another are about the
same. It has what was given as settings, passwords too, and the variables that hold further passwords. It counts as long
as its writer listens for commands (control.py); one that makes no sense, or that another user has made, is none.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from relay import maillog, private_files
from relay.config.loader import Settings, load_layers
from relay.config.model import Layers
from relay.daemon import control
from relay.json_text import json_text
from relay.mail.stored import parsed

_VERSION = 1
_MOST = 1 << 20  # octets


class Running(NamedTuple):
    """A running smtp-dup, and what it was given."""

    role: str
    pid: int
    generation: int
    layers: Layers
    environ: Mapping[str, str]  # variables that hold passwords

    def settings(self, environ: Mapping[str, str], *, require_primary: bool) -> Settings:
        """Return the settings that it runs with. Raises SettingsError."""
        return load_layers(self.layers, {**environ, **self.environ}, require_primary=require_primary)


def write(state_dir: Path, role: str, settings: Settings, generation: int) -> None:
    """Note what this process runs with; where that cannot be done it is told, and commands have to do without."""
    layers = settings.layers
    given = [value for value, _ in layers.given.values()] + [table for table, _ in (*layers.tables, *layers.servers)]
    given += [dict(fields) for fields in layers.of_backups.values()]
    names = {name for value in given for name in re.findall(r"\benv:(\w+)", str(value))}
    content = {
        "version": _VERSION,
        "pid": os.getpid(),
        "generation": generation,
        "given": {key: list(value) for key, value in layers.given.items()},
        "tables": [[table, dict(where)] for table, where in layers.tables],
        "of_backups": {name: dict(fields) for name, fields in layers.of_backups.items()},
        "servers": [[table, dict(where)] for table, where in layers.servers],
        "routes": [[table, dict(where)] for table, where in layers.routes],
        "asked": _where_it_is_asked(settings),
        "environ": {name: os.environ[name] for name in sorted(names) if name in os.environ},
    }
    try:
        data = json_text(content, indent=1).encode()
        private_files.write(state_dir.absolute(), _name(role), data, durable=False)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a date of TOML where a text is meant
        reason = str(error)
        maillog.notice("warning", "commands do not know these settings by themselves", reason=reason)


def _where_it_is_asked(settings: Settings) -> list[object]:
    """Return this host, and where its status server and its relay listen: what the container's health check reads."""
    return [socket.gethostname(), settings.status.address, settings.smtp.addresses[0]]


def remove(state_dir: Path, role: str) -> None:
    """Forget it: this process ends."""
    with contextlib.suppress(OSError):
        (state_dir.absolute() / _name(role)).unlink()


def read(state_dir: Path) -> Running | None:
    """Return what runs with this state folder, None when nothing does or that cannot be told."""
    for role in control.ROLES:
        try:
            data = private_files.read(state_dir.absolute(), _name(role), _MOST)
        except OSError:
            continue
        if len(data) <= _MOST and (found := _running(role, data)) and control.is_running(state_dir, role):
            return found
    return None


def _running(role: str, data: bytes) -> Running | None:
    try:
        found: dict[str, Any] = parsed(data)
        if found["version"] != _VERSION:
            return None
        layers = Layers(
            {str(key): (value, str(origin)) for key, (value, origin) in found["given"].items()},
            _tables(found["tables"]),
            {str(n): {str(f): str(v) for f, v in fields.items()} for n, fields in found["of_backups"].items()},
            _tables(found.get("servers", [])),
            _tables(found.get("routes", [])),
        )
        environ = {str(name): str(value) for name, value in found["environ"].items()}
        return Running(role, int(found["pid"]), int(found["generation"]), layers, environ)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _tables(found: list[Any]) -> list[tuple[Any, dict[str, str]]]:
    return [(table, {str(f): str(w) for f, w in where.items()}) for table, where in found]


def _name(role: str) -> str:
    return f"running-{role}.json"
