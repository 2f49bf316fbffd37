"""The smtp-dup command: its words, its flags, and how each kind of trouble ends.

Exit status 0 is fine, 1 is trouble (one line on standard error says which, and what to do), 2 is a command line
or settings that cannot be used, with every problem on a line of its own. What a command needs is imported when
it runs, so that the quick ones are quick; and prometheus-client only after its variable is set, see composition.
"""

from __future__ import annotations

import argparse
import difflib
import getpass
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from relay import __version__
from relay.envelope import printable
from relay.options import BY_KEY, OPTIONS, Option
from relay.settings import Problem, Settings, SettingsError, load

_FREQUENT = (
    "relay.destination_primary",
    "relay.destination_backups",
    "smtp.listen",
    "redis.url",
    "state_dir",
    "status.listen",
    "log.level",
    "log.format",
)
_ALIASES = {"redis.url": ["--redis-url"]}
_EPILOG = (
    "Every option of settings.toml is a flag too (smtp.max_hops: --smtp-max-hops 20, or --set smtp.max_hops=20) and a "
    "variable (SMTP_DUP_SMTP_MAX_HOPS). `smtp-dup check` shows what holds and where it comes from."
)

Command = Callable[[argparse.Namespace], int]


class Given:
    """The settings of one command line: before and after the command's name alike, the later one wins."""

    def __init__(self) -> None:
        self.flags: dict[str, str] = {}
        self.problems: list[Problem] = []

    def settings(self, *, require_primary: bool) -> Settings:
        """Load the settings. Raises SettingsError with every problem there is."""
        try:
            settings = load(self.flags, require_primary=require_primary)
        except SettingsError as error:
            raise SettingsError([*self.problems, *error.problems]) from None
        if self.problems:
            raise SettingsError(self.problems)
        return settings

    def note(self, key: str, value: str, *, adds: bool = False) -> None:
        known = self.flags.get(key) if adds else None
        self.flags[key] = f"{known},{value}" if known else value

    def note_pair(self, text: str) -> None:
        key, equals, value = text.partition("=")
        key = key.strip().lower()
        if not equals:
            self.problems.append(Problem("", "--set", f"expected key=value, not {text!r}"))
        elif key not in BY_KEY:
            near = difflib.get_close_matches(key, list(BY_KEY), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.problems.append(Problem(key, "--set", f"unknown option{hint}"))
        else:
            self.note(key, value)

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Give a parser the settings' flags."""
        given = self

        class Note(argparse.Action):
            def __call__(self, _p: object, _n: object, value: Any, _option: str | None = None) -> None:
                if self.dest == "set":
                    given.note_pair(value)
                else:
                    given.note(self.dest, value, adds=self.dest == "relay.destination_backups")

        group = parser.add_argument_group("settings", "These win over variables, and variables over the file.")

        def flag(option: Option, text: str) -> None:
            names = [option.flag, *_ALIASES.get(option.key, ())]
            group.add_argument(*names, dest=option.key, action=Note, metavar="X", help=text, default=argparse.SUPPRESS)

        group.add_argument("--config", dest="config", action=Note, metavar="FILE", default=argparse.SUPPRESS,
                           help="the only file to read, instead of settings.toml or config.yaml")  # fmt: skip
        for key in _FREQUENT:
            again = " Once for each." if key == "relay.destination_backups" else ""
            flag(BY_KEY[key], BY_KEY[key].help.partition(". ")[0].rstrip(".").replace("%", "%%") + "." + again)
        group.add_argument("--set", dest="set", action=Note, metavar="KEY=VALUE", default=argparse.SUPPRESS,
                           help="any option, by its key in settings.toml")  # fmt: skip
        for option in OPTIONS:
            if option.key not in _FREQUENT:
                flag(option, argparse.SUPPRESS)


class _Parsers:
    """Makes the parser of each command, all alike."""

    def __init__(self, given: Given) -> None:
        self._given = given

    def command(
        self, group: Any, name: str, text: str, run: Command, *, listing: bool = True, settings: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command; most print something that is also to be had as JSON."""
        made: argparse.ArgumentParser = group.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        made.set_defaults(run=run)
        if listing:
            made.add_argument("--json", action="store_true", help="one JSON object a line")
        if settings:
            self._given.add_to(made)
        return made

    def operation(
        self, group: Any, name: str, text: str, function: str, *, listing: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command that is a function of operations.py."""
        return self.command(group, name, text, _operation(self._given, function), listing=listing)


def build_parser(given: Given) -> argparse.ArgumentParser:
    """Return the parser of the whole command; settings on the command line go to ``given``."""
    parser = argparse.ArgumentParser(
        "smtp-dup",
        description="An SMTP relay that duplicates live mail: inline to a primary, a durable copy for every backup.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"smtp-dup {__version__}")
    given.add_to(parser)
    words = parser.add_subparsers(metavar="COMMAND", required=True)
    make = _Parsers(given)
    for name, text in (
        ("up", "run all of it: relay, workers, and a Redis of its own unless redis.url names one"),
        ("relay", "run the relay only"),
        ("workers", "run the delivery to the backups only"),
    ):
        make.command(words, name, text, _run_role(given, name), listing=False)
    text = "show what it does, with two servers of its own; needs nothing"
    make.command(words, "demo", text, _demo, listing=False, settings=False)
    make.operation(words, "check", "validate the settings, probe Redis and every server", "check")
    queue = words.add_parser("queue", help="what waits for the backups", allow_abbrev=False)
    _queue(make, queue.add_subparsers(metavar="COMMAND", required=True))
    failed = words.add_parser("failed", help="the copies that could not be delivered", allow_abbrev=False)
    _failed(make, failed.add_subparsers(metavar="COMMAND", required=True))
    text = "read a password and write its hash for smtp.users_file"
    make.command(words, "hash-password", text, _hash_password, listing=False, settings=False)
    text = "write a key for storage.key_file: to FILE, in front of those in it, or to standard output"
    new_key = make.command(words, "new-key", text, _new_key, listing=False, settings=False)
    new_key.add_argument("file", metavar="FILE", nargs="?", help="made for its owner alone, if there is none")
    make.command(words, "version", "tell the version", _version, listing=False, settings=False)
    return parser


def _queue(make: _Parsers, group: Any) -> None:
    make.operation(group, "summary", "numbers for each backup", "queue_summary")
    _of_destination(make.operation(group, "list", "the copies that wait", "queue_list"))
    _of_destination(make.operation(group, "flush", "try all that waits now", "queue_flush"))
    verify = make.operation(group, "verify", "compare the ledger with RQ and repair what disagrees", "queue_verify")
    verify.add_argument("--dry-run", action="store_true", help="change nothing")
    move = make.operation(group, "move", "give one backup's copies to another", "queue_move")
    move.add_argument("source", metavar="FROM")
    move.add_argument("target", metavar="TO")


def _failed(make: _Parsers, group: Any) -> None:
    _of_destination(make.operation(group, "list", "the failed copies", "failed_list"))
    make.operation(group, "show", "one failed message and its history", "failed_show").add_argument("id", metavar="ID")
    _of_ids(make.operation(group, "retry", "try failed copies again, now", "failed_retry"))
    drop = make.operation(group, "drop", "forget failed copies for good", "failed_drop")
    _of_ids(drop)
    drop.add_argument("--yes", action="store_true", help="do not ask")
    export = make.operation(group, "export", "write a failed message as .eml", "failed_export", listing=False)
    export.add_argument("id", metavar="ID")


def _of_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--destination", metavar="NAME", help="only this one")


def _of_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID")
    parser.add_argument("--all", action="store_true", help="every one, or every one of --destination")
    _of_destination(parser)


def _run_role(given: Given, name: str) -> Command:
    def run(_: argparse.Namespace) -> int:
        settings = given.settings(require_primary=name != "workers")
        from relay import composition  # noqa: PLC0415

        roles = (composition.UP, composition.RELAY, composition.WORKERS)
        return composition.run(settings, next(role for role in roles if role.name == name))

    return run


def _operation(given: Given, name: str) -> Command:
    def run(arguments: argparse.Namespace) -> int:
        settings = given.settings(require_primary=name == "check")
        from relay import envelope, maillog, operations, sealing  # noqa: PLC0415

        maillog.configure("warning")  # these commands' words are their output
        if name != "check":  # which says it beside all else
            try:
                sealing.use(settings.storage.key_file)
                envelope.bound(settings.smtp.max_message_bytes)
            except sealing.BadKeyFile as error:
                raise operations.Trouble(f"storage.key_file: {error}") from error
        operation: Callable[[Settings, argparse.Namespace], int] = getattr(operations, name)
        return operation(settings, arguments)

    return run


def _demo(_: argparse.Namespace) -> int:
    from relay import demo  # noqa: PLC0415

    return demo.run()


def _hash_password(_: argparse.Namespace) -> int:
    from relay.users import hash_password  # noqa: PLC0415

    if sys.stdin.isatty():
        password = getpass.getpass("Password: ")
        if password != getpass.getpass("Again: "):
            _tell("the two differ")
            return 1
    else:
        password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        _tell("no password was given")
        return 1
    sys.stdout.write(hash_password(password) + "\n")
    return 0


def _new_key(arguments: argparse.Namespace) -> int:
    from relay import sealing  # noqa: PLC0415

    if arguments.file is None:
        sys.stdout.write(sealing.new_key() + "\n")
        return 0
    try:
        ids = sealing.add_key(Path(arguments.file))
    except sealing.BadKeyFile as error:
        _tell(printable(str(error)))
        return 1
    sys.stdout.write(f"key {ids[0]} seals from the next start or SIGHUP; {len(ids)} in {printable(arguments.file)}\n")
    return 0


def _version(_: argparse.Namespace) -> int:
    sys.stdout.write(f"smtp-dup {__version__}\n")
    return 0


def run(words: Sequence[str]) -> int:
    """Run a command line. Returns the exit status; every expected trouble has been told on standard error."""
    given = Given()
    arguments = build_parser(given).parse_args(words)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except SettingsError as error:
        for problem in error.problems:
            _tell(str(problem))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `smtp-dup failed list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        return 1
    except Exception as error:
        if (text := _in_a_line(error)) is None:
            raise
        _tell(text)
        return 1
    return status


def _in_a_line(error: Exception) -> str | None:
    """Return what to tell the operator about an expected error, None for one that is ours to mend."""
    from redis.exceptions import RedisError  # noqa: PLC0415

    from relay.composition import StartError  # noqa: PLC0415
    from relay.embedded import EmbeddedError  # noqa: PLC0415
    from relay.envelope import BodyElsewhere, MalformedRecord  # noqa: PLC0415
    from relay.operations import Trouble  # noqa: PLC0415
    from relay.reading import Unknown  # noqa: PLC0415

    if isinstance(error, Trouble | Unknown | MalformedRecord | BodyElsewhere | StartError | EmbeddedError):
        return printable(str(error))
    if isinstance(error, RedisError):
        return f"Redis: {printable(str(error))}"
    return None


def _tell(line: str) -> None:
    sys.stderr.write(f"smtp-dup: {line}\n")


def main() -> NoReturn:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
