"""The settings on the command line: each option of relay/config/options.py, each field of a [[backup]], is a flag.

All commands that read settings share these flags, before and after the command's name; the later one wins, and the
values of a list add up. They are not in the help of each command: `smtp-dup help settings` has them once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, BY_KEY, OPTIONS
from relay.config.types import PATH, OptionType
from relay.mail.text import printable

if TYPE_CHECKING:
    from relay.config.loader import Settings
    from relay.config.model import Layers

_FIELDS = {field.key: field for field in BACKUP_FIELDS}
_OF_BACKUP = re.compile(r"backup\[(.+)\]\.(\w+)")


class Given:
    """What one command line gives beside the command: settings, and how the output is to look."""

    def __init__(self) -> None:
        self.flags: dict[str, str] = {}
        self.problems: list[tuple[str, str, str]] = []  # key, where it stands, what is wrong with it
        self.colour = "auto"

    def settings(self, *, require_primary: bool) -> Settings:
        """Load the settings. Raises SettingsError with every problem there is."""
        from relay.config.loader import Problem, SettingsError, load  # noqa: PLC0415  (`--help` and `version` take a third less)

        problems = [Problem(*problem) for problem in self.problems]
        try:
            settings = load(self.flags, require_primary=require_primary)
        except SettingsError as error:
            raise SettingsError([*problems, *error.problems], error.state_dir) from None
        if problems:
            raise SettingsError(problems)
        return settings

    def settings_here(
        self, *, require_primary: bool, excuse: bool = True, tell: Callable[[str], object] | None = None
    ) -> Settings:
        """Load the settings; where these add nothing to what a smtp-dup beside us runs with, take that, and tell so.

        With ``excuse`` a settings file that was broken after its start is no reason to fail: `undo` must work then,
        too. Raises SettingsError with every problem there is.
        """
        from relay.config.loader import SettingsError  # noqa: PLC0415  (as above)
        from relay.daemon import running  # noqa: PLC0415  (as above)

        try:
            own = self.settings(require_primary=False)
            found = running.read(own.state_dir)
            if found and (own.layers == found.layers or not own.layers.are_within(found.layers)):
                found = None
            why = ""
        except SettingsError as error:
            in_file = excuse and all(problem.in_file for problem in error.problems)
            found = running.read(error.state_dir) if in_file and error.state_dir else None
            why = f"; {error.problems[0]}"
        if found:
            try:
                settings = found.settings(os.environ, require_primary=require_primary)
            except SettingsError:  # a file with a password that we may not read
                return self.settings(require_primary=require_primary)
            if tell:
                tell(f"using the settings of the smtp-dup that runs here (`{found.role}`, process {found.pid}){why}")
            return settings
        return self.settings(require_primary=require_primary)

    def reader(self, *, require_primary: bool) -> Callable[[Layers | None], Settings]:
        """Return what loads the settings again; see relay.daemon.reload.Read."""
        from relay.config.loader import load  # noqa: PLC0415  (as above)

        return lambda running: load(self.flags, require_primary=require_primary, running=running)

    def note(self, value: str, key: str, *, adds: bool = False) -> None:
        """Take the value of an option; with ``adds`` beside what was given of it before."""
        known = self.flags.get(key) if adds else None
        self.flags[key] = f"{known},{value}" if known else value

    def note_field(self, text: str, flag: str, field: str) -> None:
        """Take NAME=VALUE of one backup."""
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            self.problems.append(("", flag, f"expected NAME=VALUE, with a backup's name, not {_shown(text)}"))
        else:
            self.note(value, f"backup[{name.strip()}].{field}", adds=_FIELDS[field].kind.several)

    def note_pair(self, text: str) -> None:
        """Take KEY=VALUE, the key as in settings.toml."""
        key, equals, value = text.partition("=")
        key = key.strip()
        of_backup = _OF_BACKUP.fullmatch(key)
        if not equals:
            self.problems.append(("", "--set", f"expected key=value, not {_shown(text)}"))
        elif (of_backup and of_backup[2] in _FIELDS) or (key := key.lower()) in BY_KEY:
            self.note(value, key)
        else:
            near = difflib.get_close_matches(key, list(BY_KEY), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append((printable(key), "--set", f"unknown option{hint}"))


def _shown(text: str) -> str:
    return repr(printable(text))


class KindType(click.ParamType[str]):
    """A value of the settings as click sees it: text, which the settings read; completion knows what it may be."""

    name = "text"

    def __init__(self, kind: OptionType | None = None) -> None:
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if self._kind is PATH:
            return [CompletionItem(incomplete, type="file")]
        return [
            CompletionItem(word) for word in (self._kind.words if self._kind else ()) if word.startswith(incomplete)
        ]


def _flag(names: tuple[str, ...], metavar: str, kind: OptionType | None, text: str, note: Any) -> click.Option:
    def take(ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> None:
        given = ctx.find_object(Given)
        for value in values if given else ():
            note(given, value)

    return click.Option(
        [*names, "setting_" + names[-1].strip("-").replace("-", "_")],
        multiple=True, expose_value=False, hidden=True, metavar=metavar, type=KindType(kind), help=text, callback=take,
    )  # fmt: skip


def _flags() -> Iterator[click.Option]:
    text = "the only settings file to read, instead of settings.toml or config.yaml"
    yield _flag(("--config",), "FILE", PATH, text, partial(Given.note, key="config"))
    text = "any option, by its key in settings.toml"
    yield _flag(("--set",), "KEY=VALUE", None, text, Given.note_pair)
    for option in OPTIONS:
        note = partial(Given.note, key=option.key, adds=option.kind.several)
        yield _flag(option.flags, "X", option.kind, option.help, note)
    for field in BACKUP_FIELDS:
        flag = BACKUP_FLAGS[field.key]
        yield _flag((flag,), "NAME=X", None, field.help, partial(Given.note_field, flag=flag, field=field.key))


SETTINGS_FLAGS: tuple[click.Option, ...] = tuple(_flags())
