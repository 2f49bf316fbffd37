"""How a command is made: of its help text, its own flags, and those that every command has.

A command's function is named as "module:name" and imported when it runs. The tree of commands is in commands.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from relay.command.command_line import HELP_OPTIONS, Asking, CommandGroup, Listing, Task, Word
from relay.command.filter_flags import FILTER_FLAGS, REASON_FLAGS
from relay.command.filter_flags import NAMES as FILTER_NAMES
from relay.command.flags import SETTINGS_FLAGS, Given
from relay.command.output import Output


def _take_colour(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    given = ctx.find_object(Given)
    if value and given:
        given.colour = value


def option(*names: str, **rest: Any) -> click.Option:
    """Make an option of its names, and of what click takes."""
    return click.Option(list(names), **rest)


COLOUR = option("--color", type=click.Choice(["auto", "always", "never"]), expose_value=False, callback=_take_colour,
                  help="auto: in a terminal, unless NO_COLOR is set")  # fmt: skip
JSON = option("--json", "as_json", is_flag=True, help="one JSON object a line")
WIDE = option("--wide", is_flag=True, help="one line for each row, of any length")


def sentence(text: str) -> str:
    """Return a text as a sentence; only its first letter changes, so that names stay as they are."""
    return text[:1].upper() + text[1:] + "."


def argument(name: str, kind: click.ParamType[str] | None = None, **rest: Any) -> click.Argument:
    """Make an argument that the usage shows by this name."""
    return click.Argument([name.lower()], metavar=name, type=kind, **rest)


def ids(kind: click.ParamType[str]) -> click.Argument:
    """Make the argument of a command that takes any number of ids."""
    return click.Argument(["ids"], metavar="[ID]...", type=kind, nargs=-1)


def word(
    text: str,
    place: str,
    *params: click.Parameter,
    settings: str = "any",
    output: bool = True,
    hidden: bool = False,
    colour: bool = False,
) -> Word:
    """Make a command from its help text, its function ("module:name") and its own parameters."""
    own = [*params, *((JSON,) if output else ()), *((WIDE,) if output else ()), COLOUR]

    @click.pass_context
    def read(ctx: click.Context, /, **arguments: Any) -> Task:
        given = ctx.find_object(Given)
        assert given is not None  # noqa: S101 - parse() gives it
        if output:
            look = Output(as_json=arguments.pop("as_json"), wide=arguments.pop("wide"), colour=given.colour)
            arguments["out"] = look
        if colour:
            arguments["colour"] = given.colour
        if REASON_FLAGS[0] in params:
            arguments["filters"] = {name: arguments.pop(name) for name in FILTER_NAMES if name in _names(params)}
        return Task(place, given, settings, arguments)

    return Word(
        None,
        callback=read,
        params=[*own, *(_settings_flags(own) if settings else ())],
        help=sentence(text),
        short_help=text,
        context_settings=HELP_OPTIONS,
        hidden=hidden,
    )


def _names(params: Sequence[click.Parameter]) -> set[str | None]:
    """Return the names of those that are conditions of the filter."""
    return {param.name for param in params if param in FILTER_FLAGS}


def _settings_flags(own: Sequence[click.Parameter]) -> list[click.Parameter]:
    """Return the flags of settings, but for those whose name a command has for something of its own."""
    taken = {name for param in own for name in param.opts}
    return [flag for flag in SETTINGS_FLAGS if not taken.intersection(flag.opts)]


def listing(listed: Word, commands: dict[str, Word | CommandGroup]) -> Listing:
    """Make a group that, without a subcommand, runs ``listed``."""
    return Listing(
        listed,
        name=None,
        commands=commands,
        params=listed.params,
        help=listed.help,
        short_help=listed.short_help,
        context_settings=HELP_OPTIONS,
        no_args_is_help=False,
        subcommand_metavar="[COMMAND [ARGS]...]",
        callback=lambda **_: None,
        invoke_without_command=True,
    )


def group(
    text: str,
    commands: dict[str, Word | CommandGroup],
    params: Sequence[click.Parameter] = (),
    *,
    kind: type[CommandGroup] = CommandGroup,
) -> CommandGroup:
    """Make a group of commands; ``kind``: Asking, where a word that names no command is meant for the first one."""
    return kind(
        None,
        commands={**commands},
        params=[*params, COLOUR, *SETTINGS_FLAGS],
        help=sentence(text),
        short_help=text,
        context_settings=HELP_OPTIONS,
        no_args_is_help=False,
        subcommand_metavar="ADDRESS | COMMAND [ARGS]..." if kind is Asking else "COMMAND [ARGS]...",
        options_metavar="",
        callback=lambda: None,
    )
