"""The settings as people see them: every option, server and route in words, and no secret."""

from __future__ import annotations

from typing import NamedTuple

from relay.config.model import DEMOTED_ORIGIN, Settings
from relay.config.options import OPTIONS
from relay.config.types import PATH
from relay.mail.destination import CONNECTION_AGE, MESSAGES_PER_CONNECTION, Destination


class Shown(NamedTuple):
    """One option as `smtp-dup check` shows it."""

    key: str
    value: str
    default: str
    origin: str


def describe(settings: Settings) -> list[Shown]:
    """Return every option with its value, its default and where the value came from; secrets are masked."""
    rows = []
    for option in OPTIONS:
        default = option.default if option.kind is PATH else option.kind.show(option.kind.read(option.default))
        value = option.kind.show(settings.value(option.key))
        rows.append(Shown(option.key, value, default, settings.origins.get(option.key, "default")))
    tables = [key for key in settings.origins if key.startswith("backup[")]
    for key, backup in zip(tables, settings.backups[len(settings.relay.destination_backups) :], strict=True):
        rows.append(Shown(f"backup.{backup.name}", in_words(backup), "", settings.origins[key]))
    if settings.demoted and (origin := settings.origins.get(DEMOTED_ORIGIN)):
        rows.append(Shown(f"backup.{settings.demoted.name}", in_words(settings.demoted), "", origin))
    for n, server in enumerate(settings.servers, 1):
        rows.append(
            Shown(f"server.{server.name}", in_words(server), "", settings.origins.get(f"server[{n}]", "routes"))
        )
    for n, route in enumerate(settings.route_table, 1):
        rows.append(Shown(f"route.{route.name}", route.in_words(), "", settings.origins[f"route[{n}]"]))
    return rows


def in_words(backup: Destination) -> str:
    """Return a backup on a line, its password masked."""
    user = f"{backup.username}:***@" if backup.username else ""
    place = backup.address if backup.scheme == "mx" else f"{backup.scheme}://{user}{backup.address}"
    words = [place, f"tls={backup.tls}", f"sender={backup.sender}"]
    words += [f"connections={backup.connections}"]
    words += ["soft_bounce"] * backup.soft_bounce
    if backup.messages_per_connection != MESSAGES_PER_CONNECTION:
        words.append(f"messages_per_connection={backup.messages_per_connection}")
    if backup.connection_age != CONNECTION_AGE:
        words.append(f"connection_age={backup.connection_age:g}")
    others = ("ca_file", "tls_certificate", "password_from", "dns")
    words += [f"{name}={value}" for name in others if (value := getattr(backup, name))]
    return " ".join([*words, *(f"domains={','.join(backup.domains)}" for _ in backup.domains[:1])])
