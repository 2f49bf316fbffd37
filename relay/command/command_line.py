"""What the command line is made of: commands and groups as click reads them, and the task that a line asks for.

Reading a command line runs nothing: it gives a Task, which names a function of a module of this package and what to
call it with. That module is imported when the task is run, so that `version`, `--help` and completion pay for no
Redis client and no server; nothing else here is imported late.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from relay.command.exit_status import IN_A_LINE
from relay.command.filter_flags import FILTER_FLAGS
from relay.command.filter_flags import summary as filter_summary
from relay.command.flags import SETTINGS_FLAGS, Given
from relay.mail.text import printable

NAME = "smtp-dup"
SETTINGS_HINT = f"Any setting is also a flag: {NAME} help settings"
HELP_OPTIONS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_NEAR = 0.6
_MANY_OPTIONS = 15  # lines, which fill a screen with what stands around them


@dataclass(frozen=True, slots=True)
class Task:
    """What a command line asks for: "module:function" of this package, and its arguments.

    ``settings`` says which the function takes first: "" for none, "any", "primary" for settings that name one,
    "checked" for such without a fault, or "given" for what the command line gives, to be loaded by the function.
    """

    place: str
    given: Given
    settings: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self) -> int:
        """Run it; returns the exit status."""
        leading: list[Any] = []
        if self.settings == "given":
            leading = [self.given]
        elif self.settings:
            primary, excuse = self.settings in {"primary", "checked"}, self.settings != "checked"
            leading = [self.given.settings_here(require_primary=primary, excuse=excuse, tell=tell)]
        module, _, name = self.place.partition(":")
        function: Callable[..., int] = getattr(importlib.import_module(f"relay.command.{module}"), name)
        return function(*leading, **self.arguments)


def tell(text: str) -> None:
    """Say on standard error what is to be known beside the output, or why there is none."""
    sys.stderr.write(f"{NAME}: {printable(text)}\n")


class MissingCommand(click.UsageError):
    """A group without one of its commands."""


# Groups and commands --------------------------------------------------------------------------------------------


class _Completes(click.Command):
    """A command whose settings flags are completed, too, although its help leaves them out."""

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return commands of a group, or flags."""
        found = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            known = {item.value for item in found}
            for option in self.get_params(ctx):
                if isinstance(option, click.Option) and option.hidden:
                    text = (option.help or "").partition(". ")[0]
                    found += [
                        CompletionItem(name, help=text)
                        for name in option.opts
                        if name.startswith(incomplete) and name not in known
                    ]
        return found


class Word(_Completes):
    """A command that does something."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shown = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        rows = [row for param in shown if (row := param.get_help_record(ctx))]
        if len(rows) >= _MANY_OPTIONS:  # it is to fit a screen; who reads this knows --help
            rows = [row for row in rows if "--help" not in row[0]]
        if rows:
            with formatter.section("Options"):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        if any(flag in self.params for flag in FILTER_FLAGS):
            formatter.write(filter_summary(formatter.width, self.params))
        if any(param in SETTINGS_FLAGS for param in self.params):
            formatter.write(SETTINGS_HINT + "\n")
        formatter.write(IN_A_LINE + "\n")


class CommandGroup(_Completes, click.Group):
    """Commands that belong together; whoever mistypes one is told what it may have been.

    ``lesser`` are named in the help without a line of their own each: it is to fit a screen.
    """

    lesser: frozenset[str] = frozenset()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, command in self.commands.items() if not command.hidden]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"no such command: {args[0]}{self._meant(ctx, args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx._protected_args and not ctx.args:  # noqa: SLF001  (click 8.2 deprecates its public name)
            raise MissingCommand("which command?", ctx)
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_paragraph()
        formatter.write(f"Options: --color auto|always|never, {'' if ctx.parent else '--version, '}--help\n")
        formatter.write(SETTINGS_HINT + "\n")
        formatter.write(IN_A_LINE + "\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)  # the options are on one line, in the epilog: it is to fit a screen

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        names = self.list_commands(ctx)
        rows = [(name, self.commands[name].get_short_help_str(200)) for name in names if name not in self.lesser]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        if lesser := [name for name in names if name in self.lesser]:
            formatter.write_paragraph()
            text = f"Also: {', '.join(lesser)}"
            formatter.write(textwrap.fill(text, formatter.width + 2, break_on_hyphens=False) + "\n")

    def _meant(self, ctx: click.Context, name: str) -> str:
        near = difflib.get_close_matches(name, self.list_commands(ctx), 1, _NEAR)
        if near:
            return f"; did you mean {near[0]}?"
        # `smtp-dup list`: where it belongs.
        within = [
            f"{group} {name}"
            for group, found in self.commands.items()
            if isinstance(found, CommandGroup) and name in found.commands
        ]
        return f"; did you mean {' or '.join(within)}?" if within else f"; see {ctx.command_path} --help"


class Asking(CommandGroup):
    """Commands of which one, the first, is meant where no other is named: `route user@example.com`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and not any(word in self.commands for word in words):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


class Listing(CommandGroup):
    """Commands about what the group itself shows, without one of them."""

    def __init__(self, listing: Word, **rest: Any) -> None:
        super().__init__(**rest)
        self._listing = listing

    def invoke(self, ctx: click.Context) -> Any:
        if not ctx._protected_args and not ctx.args:  # noqa: SLF001  (click 8.2 deprecates its public name)
            assert self._listing.callback is not None  # noqa: S101 - a Word has one
            return ctx.invoke(self._listing.callback, **ctx.params)
        # Another command has options of its own, behind its name: one that is lost in front of it is no answer.
        for param in self.params:
            if param.name in ctx.params and ctx.get_parameter_source(param.name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{param.opts[0]} belongs behind the command", ctx)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Without --help and --color, which all commands have: it is to fit a screen.
        own = [param for param in self.params if "--color" not in param.opts]
        rows = [row for param in own if (row := param.get_help_record(ctx))]
        with formatter.section("Options"):
            formatter.write_dl(rows)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._listing.format_epilog(ctx, formatter)
