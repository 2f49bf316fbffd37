"""The manual page smtp-dup(1), from the commands' own help and the table of settings, in the man macros."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator

import click

from relay import __version__
from relay.command import command_factory, command_line, commands
from relay.command.command_factory import sentence
from relay.command.exit_status import MEANINGS
from relay.command.filter_flags import FILTER_FLAGS
from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, OPTIONS, SECTIONS, Option

_DESCRIPTION = """\
smtp-dup stands between an MTA and two or more mail servers. Each message goes inline to the primary, whose replies are
what the client hears; a durable copy goes to every backup, by way of Redis and workers that retry it and keep what
fails. It is for moving from one mail server to another without losing a message."""

_FILES = (
    ("./settings.toml, ./config.yaml, /etc/smtp-dup/settings.toml, /etc/smtp-dup/config.yaml",
     "The first folder in which one of them sets anything; or the one file of --config or SMTP_DUP_CONFIG."),
    ("/var/lib/smtp-dup, ~/.local/state/smtp-dup", "The state folder, root's and others': spool and embedded Redis."),
)  # fmt: skip

_EXAMPLES = (
    ("All of it, with a Redis of its own", "smtp-dup up --primary old.example.com:25 --backup new=new.example.com:25"),
    ("What waits for one backup", "smtp-dup queue list --destination new"),
    ("Try again what has failed", "smtp-dup failed retry --all --destination new"),
)


def page() -> str:
    """Return the page."""
    lines: list[str] = []
    for line in _lines():
        is_text = not line.startswith((".", "'"))
        lines += textwrap.wrap(line, 78, break_on_hyphens=False, break_long_words=False) if is_text else [line]
    return "\n".join(_safe(lines)) + "\n"


def _safe(lines: list[str]) -> Iterator[str]:
    """Yield lines, none of which is a request by accident: one that was broken may begin with a dot."""
    requests = re.compile(r"\.(TH|SH|SS|TP|PP|RS|RE|nf|fi|br|B|I|BR|RI)\b")
    for line in lines:
        yield "\\&" + line if line.startswith((".", "'")) and not requests.match(line) else line


def _lines() -> Iterator[str]:
    yield f'.TH SMTP\\-DUP 1 2026-11-27 "smtp\\-dup {_roff(__version__)}" "smtp\\-dup"'
    yield from (".SH NAME", f"smtp\\-dup \\- {_roff(commands.ROOT.short_help or '')}")
    yield from (".SH SYNOPSIS", ".B smtp\\-dup", ".RI [ settings ]", ".I command", ".RI [ arguments ]")
    yield from (".SH DESCRIPTION", _roff(_DESCRIPTION.replace("\n", " ")))
    yield ".SH COMMANDS"
    yield from _commands(commands.ROOT, ())
    yield ".SH OPTIONS OF MANY COMMANDS"
    for option in (command_factory.JSON, command_factory.WIDE, command_factory.COLOUR):
        yield from _option(option)
    yield from (".SH FILTERS", _roff("Conditions of the commands that list or change many copies."))
    yield _roff("A copy must meet all that are given; changing words want at least one, ids, or --all.")
    for option in FILTER_FLAGS:
        yield from _option(option)
    yield from _settings()
    yield ".SH EXIT STATUS"
    for status, meaning in MEANINGS.items():
        yield from (".TP", f".B {status}", _roff(sentence(meaning)))
    yield ".SH ENVIRONMENT"
    yield from (".TP", ".B SMTP_DUP_...", "The settings, as above; empty counts as not set.")
    yield from (".TP", ".B NO_COLOR", "If it is set, nothing is coloured unless by \\-\\-color=always.")
    yield ".SH FILES"
    for names, text in _FILES:
        yield from (".TP", f".I {_roff(names)}", _roff(text))
    yield ".SH EXAMPLES"
    for text, line in _EXAMPLES:
        yield from (".TP", _roff(text) + ":", f".B {_roff(line)}")
    yield from (".SH SEE ALSO", ".BR postfix (1),", ".BR redis\\-server (1)")


def _commands(group: click.Group, names: tuple[str, ...]) -> Iterator[str]:
    common = {command_factory.COLOUR, command_factory.JSON, command_factory.WIDE}
    for name in group.list_commands(click.Context(group)):
        command = group.commands[name]
        if isinstance(command, click.Group) and not isinstance(command, command_line.Listing):
            yield from _commands(command, (*names, name))
            continue
        usage = " ".join(
            p.make_metavar(click.Context(command)) for p in command.params if isinstance(p, click.Argument)
        )
        yield from (".TP", f".B smtp\\-dup {_roff(' '.join((*names, name)))}" + (f" {_roff(usage)}" if usage else ""))
        yield _roff(command.help or "")
        for param in command.params:
            if isinstance(param, click.Option) and not param.hidden and param not in common:
                yield from (".RS", *_option(param), ".RE")
        if isinstance(command, click.Group):
            yield from _commands(command, (*names, name))


def _option(option: click.Option) -> Iterator[str]:
    yield from (".TP", f".B {_roff(_flag(option))}", _roff(sentence(option.help or "")))


def _flag(option: click.Option) -> str:
    names = ", ".join(option.opts)
    if option.is_flag:
        return names
    return f"{names} {option.make_metavar(click.Context(commands.ROOT))}"


def _settings() -> Iterator[str]:
    yield from (".SH SETTINGS", "Every setting is a flag, a variable, and an option in the file.")
    yield _roff("A flag wins over a variable, a variable over the file. Lists are written with commas.")
    section = None
    for option in OPTIONS:
        head = option.key.rpartition(".")[0]
        if head != section:
            section = head
            yield f".SS {_roff(f'{head}: {SECTIONS[head]}' if head else 'state_dir')}"
        facts = f"{option.key}, {option.variables[0]}, default {json.dumps(option.default)}."
        yield from _setting(" X, ".join(option.flags) + " X", option, facts)
    yield ".SS Of one backup, by its name, as in \\-\\-backup NAME=host:port"
    for field in BACKUP_FIELDS:
        yield from _setting(f"{BACKUP_FLAGS[field.key]} NAME=X", field, f"{field.key} in [[backup]].")


def _setting(flags: str, option: Option, facts: str) -> Iterator[str]:
    yield from (".TP", f".B {_roff(flags)}", _roff(option.explained), ".br", _roff(facts))


def _roff(text: str) -> str:
    """Return text for a line of its own: no escape, no hyphen that is no minus, no request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return "\\&" + text if text.startswith((".", "'")) else text
