"""Loads and validates the settings: a file, then SMTP_DUP_* variables, then flags -> one frozen Settings.

The table in options.py defines what can be set. Validation does not stop at the first fault: SettingsError holds every
problem, one line each, with its place (file and line, variable or flag) and without any secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from relay import ownership
from relay.config.consistency import disagreements
from relay.config.layers import GivenSettings, GivenValue
from relay.config.model import DEMOTED_ORIGIN, PARTS, Layers, Settings
from relay.config.options import BY_KEY, OPTIONS
from relay.config.problems import Problem, SettingsError
from relay.config.servers import Servers, read_servers

__all__ = ["Problem", "Settings", "SettingsError", "load"]

DIRECTORIES = (Path(), Path("/etc/smtp-dup"))


def load(
    flags: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    directories: Sequence[Path] = DIRECTORIES,
    *,
    require_primary: bool = True,
    running: Layers | None = None,
) -> Settings:
    """Read and validate the settings. Raises SettingsError with all problems.

    ``flags`` maps a key to its text, lists comma-separated; the key "config" names the only file to read, and
    "backup[NAME].FIELD" sets a field of one backup, wherever the backup is defined. Options that take a restart keep
    the values of ``running``.
    """
    given = GivenSettings(os.environ if environ is None else environ)
    given.take(flags or {}, directories)
    if running:
        given.keep(running)
    return _settings(given, require_primary=require_primary)


def load_layers(layers: Layers, environ: Mapping[str, str], *, require_primary: bool = True) -> Settings:
    """Read the settings from what was given elsewhere. Raises SettingsError."""
    return _settings(GivenSettings.of(layers, environ), require_primary=require_primary)


def _settings(given: GivenSettings, *, require_primary: bool) -> Settings:
    """Make the settings of what was given. Raises SettingsError."""
    values = _values(given)
    if isinstance(values["state_dir"], Path):
        ownership.trust(values["state_dir"])
    servers = read_servers(given, values)
    if require_primary and not values["relay.destination_primary"]:
        _primary_is_missing(given)
    for key, text in disagreements(values):
        given.wrong(key, text)
    if given.problems:
        raise SettingsError(given.problems, values["state_dir"])
    sections: dict[str, Any] = {
        name: kind(**{f.name: values[f"{name}.{f.name}"] for f in fields(kind)}) for name, kind in PARTS.items()
    }
    return Settings(
        **sections,
        state_dir=values["state_dir"],
        primary=servers.primary,
        demoted=servers.demoted,
        backups=servers.backups,
        origins=_origins(given, servers),
        layers=given.layers,
        servers=servers.others,
        route_table=servers.routes,
    )


def _origins(given: GivenSettings, servers: Servers) -> dict[str, str]:
    """Return where each option, server and route comes from."""
    origins = {key: value.origin for key, value in given.given.items()}
    for kind, tables in (("backup", given.tables), ("server", given.servers), ("route", given.routes)):
        origins |= {f"{kind}[{n}]": where[""] for n, (_, where) in enumerate(tables, 1)}
    if servers.demoted_table:
        origins[DEMOTED_ORIGIN] = origins.pop(f"backup[{servers.demoted_table}]")
    return origins


def _primary_is_missing(given: GivenSettings) -> None:
    option = BY_KEY["relay.destination_primary"]
    if not given.file_failed and not any(problem.key == option.key for problem in given.problems):
        given.wrong(option.key, f"must be given: {option.flag} host:port, or {option.variables[0]}")


def _values(given: GivenSettings) -> dict[str, Any]:
    """Return the value of every option; one that cannot be read is a problem and gets its default."""
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if option.key in given.given:
            try:
                values[option.key] = option.kind.read(given.given[option.key].value)
            except ValueError as error:
                given.wrong(option.key, str(error))
        values.setdefault(option.key, option.kind.read(option.default))
    if values["state_dir"] is None:
        values["state_dir"] = default_state_dir(given.environ)
    if values["redis.sentinels"] and not values["redis.url"]:
        values["redis.url"] = "redis://"
    written = given.given.get("spool.dir", GivenValue(BY_KEY["spool.dir"].default, "")).value
    if isinstance(written, str) and written.startswith("<state_dir>"):
        values["spool.dir"] = Path(str(values["state_dir"]) + written.removeprefix("<state_dir>"))
    return values


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return the default of state_dir."""
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.partition(":")[0]).absolute()  # systemd may list several
    if os.geteuid() == 0:
        return Path("/var/lib/smtp-dup")
    home = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME") or "/var/tmp", ".local/state")  # noqa: S108 - lasts
    return Path(home, "smtp-dup").absolute()
