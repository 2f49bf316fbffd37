"""Runs a command line and tells every expected trouble on a line of its own.

What each exit status means is in exit_status.py. An exception that nobody expects is an error of ours and keeps its
traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from relay.command import command_line, commands, exit_status
from relay.mail.text import printable


def run(words: Sequence[str]) -> int:
    """Run a command line. Returns the exit status; every expected trouble has been told on standard error."""
    try:
        task = commands.parse(words)
        status = task if isinstance(task, int) else task.run()
        sys.stdout.flush()
    except command_line.MissingCommand as error:
        sys.stderr.write(error.ctx.get_help() + "\n" if error.ctx else "")
        return exit_status.USAGE
    except click.UsageError as error:
        command_line.tell(_misuse(error))
        return exit_status.USAGE
    except (KeyboardInterrupt, click.Abort):
        return exit_status.INTERRUPTED
    except BrokenPipeError:  # `smtp-dup failed list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries again at its end
        return exit_status.UNREAD
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        status, lines = told
        for line in lines:
            command_line.tell(line)
    return status


def _misuse(error: click.UsageError) -> str:
    """Return click's message in our words: lower case, no full stop, and what was meant or where to look."""
    if isinstance(error, click.NoSuchOption):
        near = error.possibilities or ()
        hint = f"; did you mean {near[0]}?" if near else _see(error)
        return f"no such option: {printable(error.option_name)}{hint}"
    text = printable(error.format_message()).rstrip(".")
    return text if "; " in text else text[:1].lower() + text[1:] + _see(error)


def _see(error: click.UsageError) -> str:
    return f"; see {error.ctx.command_path} --help" if error.ctx else ""


def _told(error: Exception) -> tuple[int, list[str]] | None:
    """Return the exit status and what to tell about an expected error, None for one that is ours to mend."""
    if isinstance(error, exit_status.Trouble):
        return error.status, [str(error)]
    if isinstance(error, UnicodeEncodeError):  # of an argument, on its way to Redis
        return exit_status.USAGE, [f"not UTF-8: {error.object[:200]}"]
    if isinstance(error, OSError):  # standard output on a full disk, a file that cannot be read
        where = f"{error.filename}: " if error.filename else ""
        return exit_status.NO, [f"{where}{error.strerror or error}"]
    for module, name, status in _RAISED:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(error, kind):
            prefix = _PREFIXES.get(name, "")
            if "WRONGTYPE" in str(error):
                return status, ["Redis: a key is of another type than it should be; `smtp-dup queue verify` renames it"]
            return status, [prefix + line for line in str(error).splitlines() or [name]]
    return None


# Looked for among the modules that are there: who raises one has imported it, and the others take too long.
_RAISED = (
    ("relay.config.loader", "SettingsError", exit_status.USAGE),
    ("relay.daemon.start", "NoRedis", exit_status.CANNOT_SAY),
    ("relay.daemon.start", "StartError", exit_status.NO),
    ("relay.redisio.embedded", "EmbeddedError", exit_status.NO),
    ("relay.mail.record", "BodyElsewhere", exit_status.NO),
    ("relay.mail.record", "MalformedRecord", exit_status.NO),
    ("relay.ledger.queries", "Unknown", exit_status.NO),
    ("relay.routing.table_file", "BadTable", exit_status.NO),
    ("redis.exceptions", "RedisError", exit_status.CANNOT_SAY),
)
_PREFIXES = {"BadTable": "a table cannot be read: ", "RedisError": "Redis: "}


def main() -> NoReturn:
    """Run the command line of this process, and exit with its status."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us (>&-); a file of ours must not get its number
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            # It outlives the object: whoever sets another stream must not close the number.
            setattr(sys, name, open(descriptor, "w", encoding="utf-8", closefd=False))  # noqa: SIM115 - for the process's life
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    status = run(sys.argv[1:])
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.exit(status)
