"""`help` and `version`: help on a command, all settings as flags, the manual page."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator

from relay import __version__
from relay.command import command_line, commands, filter_flags, manual
from relay.command.exit_status import WELL, Misuse
from relay.command.output import terminal_width
from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, OPTIONS, SECTIONS

_HEAD = """\
Every setting is a flag of every command that has settings. A flag wins over a
variable, a variable over the file. Where a value is a list, it is written with
commas, or the flag is given once for each.
"""


def show(topic: tuple[str, ...]) -> int:
    """Print help on a topic, which is a command, or settings, filters, or man."""
    if topic[:1] == ("settings",):
        sys.stdout.write(settings(topic[1:]))
    elif topic == ("filters",):
        sys.stdout.write(filter_flags.page(min(terminal_width(), 80)))
    elif topic == ("man",):
        sys.stdout.write(manual.page())
    else:
        sys.stdout.write(commands.path(topic).get_help() + "\n")
    return WELL


def version() -> int:
    """Print the version."""
    sys.stdout.write(f"{command_line.NAME} {__version__}\n")
    return WELL


def settings(words: tuple[str, ...] = ()) -> str:
    """Return all settings as flags, or those in whose names one of the words is."""
    width = min(terminal_width(), 80)
    blocks = [block for block in _blocks(width) if not words or any(word in block[0] for word in words)]
    if not blocks:
        raise Misuse(f"no setting has {' or '.join(words)} in its name; see {command_line.NAME} help settings")
    parts = []
    before = ""
    for _, section, text in blocks:
        if section != before:
            parts.append(textwrap.fill(section, width, subsequent_indent="  ") + "\n")
            before = section
        parts.append(text)
    return ("" if words else _HEAD + "\n") + "\n".join(parts)


def _blocks(width: int) -> Iterator[tuple[str, str, str]]:
    """Yield for each setting its names, its section and its text."""
    yield from (
        ("--config SMTP_DUP_CONFIG", "The file",
         _text("--config FILE", "The only settings file to read.", "SMTP_DUP_CONFIG", width)),
        ("--set", "The file", _text("--set KEY=VALUE", "Any setting, by its key in settings.toml.", "", width)),
    )  # fmt: skip
    for option in OPTIONS:
        section = option.key.rpartition(".")[0]
        title = f"{section}: {SECTIONS[section]}" if section else "state_dir"
        names = ", ".join(f"{flag} X" for flag in option.flags)
        facts = f"{option.key}, {option.variables[0]}, default {json.dumps(option.default)}"
        yield f"{names} {facts}", title, _text(names, option.explained, facts, width)
    for field in BACKUP_FIELDS:
        flag = f"{BACKUP_FLAGS[field.key]} NAME=X"
        facts = f"{field.key} in [[backup]]"
        title = "backup: of the backup that is called NAME, as in --backup NAME=host:port"
        yield f"{flag} {facts}", title, _text(flag, field.explained, facts, width)


def _text(names: str, meaning: str, facts: str, width: int) -> str:
    lines = textwrap.wrap(meaning, width - 6, break_on_hyphens=False)
    lines += textwrap.wrap(facts, width - 6, break_on_hyphens=False)
    return f"  {names}\n" + "".join(f"      {line}\n" for line in lines)
