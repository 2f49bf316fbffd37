"""The commands with their flags and help texts; their classes are in command_line.py, flags of settings in flags.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from relay import __version__
from relay.command.command_factory import argument as _argument
from relay.command.command_factory import group as _group
from relay.command.command_factory import ids as _ids
from relay.command.command_factory import listing as _listing
from relay.command.command_factory import option as _option
from relay.command.command_factory import word as _word
from relay.command.command_line import HELP_OPTIONS, NAME, Asking, CommandGroup, Task, Word
from relay.command.completed_names import DESTINATION, FAILED_ID, GROUP, ROUTE, SERVER, TOPIC, WAITING_ID, Names
from relay.command.filter_flags import FILTER_FLAGS, REASON_FLAGS
from relay.command.flags import Given

# Options that many have -----------------------------------------------------------------------------------------


_DESTINATION = _option("--destination", metavar="NAME", type=Names(DESTINATION), help="only this one")
_ALL = _option("--all", "everything", is_flag=True, help="all, or all that match the filters")
_UNCERTAIN = _option("--uncertain", is_flag=True, help="list messages that the primary may not have")
_WAIT = _option("--wait", is_flag=True, help="show the result for each, within a minute")
_YES = _option("--yes", is_flag=True, help="do not ask")
_NO_QUESTION = _option("--yes", is_flag=True, help="has no effect: this command never asks")
_WAIT_FOR = _option("--wait", metavar="TIME", default="10s", show_default=True, help="for the relay processes")
_AT_ONCE = _option("--now", is_flag=True, help="skip the check that relays reach the server")
_REASON = _option("--reason", metavar="TEXT", default="", help="the reason, for the audit")
_CHECK = _option("--check", is_flag=True, help="ask the new server whether they exist there")
_DRY_RUN = _option("--dry-run", is_flag=True, help="show what would be done; change nothing")


_NAME = click.Argument(["name"], metavar="NAME", type=Names(DESTINATION))


# The tree -------------------------------------------------------------------------------------------------------

_QUEUE: dict[str, Word | CommandGroup] = {
    "summary": _word("numbers for each backup", "queue:summary"),
    "list": _word("the waiting copies", "queue:listing", _UNCERTAIN, *FILTER_FLAGS),
    "show": _word("one waiting message and its history", "queue:show", _argument("ID", Names(WAITING_ID))),
    "flush": _word(
        "try waiting copies now: all, or those that match the filters", "queue:flush",
        _ids(Names(WAITING_ID)), _ALL, _DRY_RUN, _NO_QUESTION, *FILTER_FLAGS,
    ),
    "drop": _word(
        "delete waiting copies for good", "queue:drop",
        _ids(Names(WAITING_ID)), _ALL, _DRY_RUN, _YES, *FILTER_FLAGS,
    ),
    "verify": _word("compare the ledger with RQ and repair differences", "queue:verify", _DRY_RUN),
    "move": _word(
        "move the copies of one backup to another", "queue:move",
        click.Argument(["source"], metavar="FROM", type=Names(DESTINATION)),
        click.Argument(["target"], metavar="TO", type=Names(DESTINATION)),
    ),
    "forget": _word(
        "remove a former backup that has no copies left", "queue:forget",
        click.Argument(["name"], metavar="NAME", type=Names(DESTINATION)),
    ),
}  # fmt: skip

_FAILED: dict[str, Word | CommandGroup] = {
    "list": _word("the failed copies", "failed:listing", *FILTER_FLAGS),
    "show": _word("one failed message and its history", "failed:show", _argument("ID", Names(FAILED_ID))),
    "retry": _word(
        "try failed copies again, now", "failed:retry",
        _ids(Names(FAILED_ID)), _ALL, _WAIT, _DRY_RUN, _NO_QUESTION, *FILTER_FLAGS,
    ),
    "drop": _word(
        "delete failed copies for good", "failed:drop", _ids(Names(FAILED_ID)), _ALL, _DRY_RUN, _YES, *FILTER_FLAGS
    ),
    "export": _word(
        "write a failed message as .eml, or many into a folder", "export:export",
        click.Argument(["words"], metavar="ID | [ID]... DIR", type=Names(FAILED_ID), nargs=-1),
        _ALL, _DRY_RUN, *FILTER_FLAGS,
    ),
}  # fmt: skip

_KEY = _argument("KEY", Names(GROUP))
_DIVERGENCE = _word(
    "what a backup refuses that the primary accepts, by reason", "divergence:listing", _DESTINATION,
    _option("--since", metavar="TIME", help="seen within this time: 90s, 5m, 1h, 5d"),
    _option("--by", metavar="WHAT", type=click.Choice(["reason", "domain", "recipient", "day"]), default="reason",
            help="add up by reason, domain, recipient or day"),
    _option("--kind", metavar="KIND", type=click.Choice(["refused", "given-up", "deferred", "noise", "accepts-more"]),
            help="refused, given-up, deferred or noise"),
    _option("--all", "everything", is_flag=True, help="also acknowledged and closed reasons"),
    _option("--route", metavar="ROUTE", type=Names(ROUTE), default="", help="about a recipient whose mail takes it"),
    *REASON_FLAGS,
)  # fmt: skip
_DIVERGENCES: dict[str, Word | CommandGroup] = {
    "show": _word("one reason: its text, examples and recipients", "divergence:show", _KEY, _DESTINATION),
    "ack": _word(
        "acknowledge a reason, so that it does not count for a time", "divergence:acknowledge", _KEY, _DESTINATION,
        _option("--note", metavar="TEXT", required=True, help="why"),
        _option("--for", "time", metavar="TIME", default="30d", help="how long: 1h, 5d; 30d"),
        _option("--domain", "domains", metavar="DOMAIN", multiple=True, help="only for recipients in this domain"),
    ),
    "unack": _word(
        "withdraw the acknowledgement of a reason", "divergence:unacknowledge", _KEY, _DESTINATION,
        _option("--note", metavar="TEXT", default="", help="why"),
    ),
    "retry": _word("try the failed copies of a reason again, now", "divergence:retry", _KEY, _DESTINATION),
}  # fmt: skip

_ROUTE_NAME = click.Argument(["route"], metavar="ROUTE", type=Names(ROUTE))
_ROUTE: dict[str, Word | CommandGroup] = {
    "show": _word(
        "which route an address takes, who answers for it, and why", "route:show",
        click.Argument(["address"], metavar="ADDRESS"),
        _option("--sender", metavar="ADDRESS", default="", help="of the message; the null sender"),
        _option("--client", metavar="IP", default="", help="that sends it; 127.0.0.1"),
        _option("--listen", metavar="HOST:PORT", default="", help="of ours, that it connects to; the first"),
        settings="primary",
    ),
    "list": _word("every route with its servers, and who of them answers for how much", "route_list:show"),
    "weight": _word(
        "share a route's mail among its servers by weights, without a restart", "route_roles:weight",
        _ROUTE_NAME, click.Argument(["weights"], metavar="SERVER=WEIGHT...", nargs=-1, required=True),
        _DRY_RUN, _WAIT_FOR, _AT_ONCE, _REASON, _YES, settings="primary",
    ),
    "reset": _word(
        "let a route be as the settings say, whatever was decided", "route_roles:reset",
        _ROUTE_NAME, _DRY_RUN, _WAIT_FOR, _AT_ONCE, _REASON, _YES, settings="primary",
    ),
}  # fmt: skip

_SERVER = _option("--server", metavar="NAME", type=Names(DESTINATION), help="only those at this one")
_MOVED = _word("the mailboxes that have moved: to which server, since when, by whom", "moved:listing", _SERVER)
_MOVES: dict[str, Word | CommandGroup] = {
    "list": _MOVED,
    "show": _word(
        "who answers for one address, and why", "moved:show", click.Argument(["address"], metavar="ADDRESS")
    ),
    "export": _word(
        "write the map for Postfix, Dovecot or nginx, or as CSV", "moved:export",
        _option("--format", "form", type=click.Choice(["postfix", "dovecot", "nginx", "csv"]), required=True,
                help="postfix, dovecot, nginx or csv"),
        _option("--host", "hosts", metavar="NAME=HOST", multiple=True,
                help="the host that stands for a server, where it is not that of mail: new=imap.example.com"),
        _SERVER, output=False,
    ),
}  # fmt: skip

ROOT = _group(
    "relay mail to a primary, and a durable copy of it to every backup",
    {
        "up": _word("run everything: relay, workers, and a Redis unless one is set", "services:up",
                    settings="given", output=False),
        "relay": _word("run the relay only", "services:relay", settings="given", output=False),
        "workers": _word("run the delivery to the backups only", "services:workers", settings="given", output=False),
        "demo": _word(
            "show how it works, with servers of its own", "services:demo",
            _option("--routes", is_flag=True, help="with a third server, which a route names for a domain"),
            settings="", output=False, colour=True,
        ),
        "reload": _word(
            "apply new settings without a restart", "reload:reload",
            _DRY_RUN, _option("--wait", metavar="TIME", default="10s", help="for all processes to follow; 10s"),
            _option("--allow-empty", is_flag=True, help="even if a table of routes that had many keys is empty now"),
            settings="given",
        ),
        "check": _word("validate the settings, probe Redis and every server", "check:check", settings="checked"),
        "route": _group(
            "which route an address takes; weights of its servers", _ROUTE, kind=Asking,
        ),
        "ready": _word(
            "whether a backup is ready to be the primary, and why not", "ready:show",
            click.Argument(["name"], metavar="[NAME|ADDRESS]", required=False, type=Names(DESTINATION)),
            _option("--check", is_flag=True, help="of an ADDRESS: ask the server whether it exists there"),
            _option("--moved", is_flag=True, help="the mailboxes that have moved, instead of a backup"),
            _option("--route", metavar="ROUTE", type=Names(ROUTE), default="", help="only who gets copies on it"),
            _option("--nagios", is_flag=True, help="one line and exit status for a monitoring system"),
            _option("--explain", is_flag=True, help="each criterion's rule, and its settings"),
        ),
        "probe": _word(
            "whether recipients exist at a server: it is asked, and sent nothing", "probe:probe",
            click.Argument(["name"], metavar="NAME", type=Names(SERVER)),
            _option("--recipients", metavar="FILE", type=click.Path(allow_dash=True),
                    help="one address a line, or CSV; - for stdin"),
            _option("--seen", metavar="TIME", help="whom the primary has taken within this time: 1d, 30d"),
            _option("--refused", is_flag=True, help="whom the primary has refused, of whom none should exist"),
            _option("--route", metavar="ROUTE", type=Names(ROUTE), default="", help="only whose mail takes this route"),
            _option("--rate", metavar="N/s", default="5/s", show_default=True, help="recipients a second"),
            _option("--per-connection", metavar="N", type=click.IntRange(1, 1000), default=20, show_default=True,
                    help="recipients, at most"),
            _option("--sender", metavar="ADDRESS", help="of MAIL; postmaster@ and smtp.domain"),
            _option("--fresh", is_flag=True, help="ask again about those that were answered, too"),
            _option("--csv", "as_csv", is_flag=True, help="write all answers as CSV"),
        ),
        "hold": _word(
            "keep copies from a backup for a time", "hold:hold", _NAME,
            _option("--reason", metavar="TEXT", required=True, help="why"),
            _option("--for", "length", metavar="TIME", help="it ends by itself: 30m, 2h, 1d"),
            _option("--until-released", is_flag=True, help="it does not"),
        ),
        "release": _word("end a hold", "hold:release", _NAME),
        "throttle": _word(
            "bound how fast a backup gets its copies", "hold:throttle", _NAME,
            _option("--rate", metavar="N/s", help="copies a second: 50/s, 600/m, 0.5/s"),
            _option("--connections", metavar="N", type=click.IntRange(1, 10_000), help="connections at once"),
            _option("--off", is_flag=True, help="no bounds any more"),
        ),
        "top": _word(
            "watch the mail traffic", "top:show",
            _option("--interval", metavar="SECONDS", type=click.FloatRange(0.2, 3600), default=1.0,
                    help="between two updates; 1"),
            _option("--once", is_flag=True, help="show it once and end"),
        ),
        "open": _word(
            "print a link that opens the page in a browser, once", "open:link",
            _option("--role", metavar="ROLE", type=click.Choice(["viewer", "operator"]), default="operator",
                    help="viewer or operator; operator"),
        ),
        "flow": _word(
            "messages received and their outcomes, by hour or minute", "flow:show",
            _option("--hours", metavar="N", type=click.IntRange(1, 840), help="the last N hours; 24"),
            _option("--minutes", metavar="N", type=click.IntRange(1, 1500), help="the last N minutes instead"),
            _option("--route", metavar="ROUTE", type=Names(ROUTE), default="", help="only what its servers took"),
        ),
        "trace": _word(
            "what became of a message, by id, Message-ID, address or queue id", "trace:show",
            click.Argument(["what"], metavar="[WHAT]...", nargs=-1),
            _option("--since", metavar="TIME", help="received within 90s, 5m, 1h, 5d, or since 2026-11-27T10:00"),
            _option("--until", metavar="TIME", help="received before that"),
            _option("--status", type=click.Choice(["delivered", "waiting", "failed", "refused", "lost", "gone"]),
                    help="only messages that have come to this"),
            _option("--limit", metavar="N", type=click.IntRange(1, 100_000), default=50,
                    help="messages, the newest; 50"),
        ),
        "promote": _word(
            "make a backup the primary, without a restart", "promote:promote",
            click.Argument(["name"], metavar="[NAME]", required=False, type=Names(SERVER)),
            _option("--route", metavar="ROUTE", type=Names(ROUTE), default="", help="only on this route"),
            _DRY_RUN, _WAIT_FOR, _option("--cancel", is_flag=True, help="cancel a prepared promotion, also another's"),
            _AT_ONCE, _option("--force", is_flag=True, help="even if it is not known to be ready"), _REASON, _YES,
            settings="primary",
        ),
        "move": _word(
            "move mailboxes to another server, one by one, or back", "move:move",
            click.Argument(["addresses"], metavar="[ADDRESS]...", nargs=-1),
            _option("--file", metavar="FILE", help="one address a line, or CSV; - for stdin"),
            _option("--domain", "domains", metavar="DOMAIN", multiple=True, help="everybody in it"),
            _option("--to", metavar="NAME", type=Names(DESTINATION), help="the server that is to answer"),
            _option("--back", is_flag=True, help="to whoever answered before"),
            _option("--all", "everything", is_flag=True, help="promote the new server, then clear the map"),
            _CHECK,
            _option("--repair", is_flag=True, help="put back what Redis has lost of who has moved"),
            _option("--note", metavar="TEXT", default="", help="why, kept with each address and in the audit"),
            _DRY_RUN, _WAIT_FOR, _option("--force", is_flag=True, help="even if a mailbox is not known to be ready"),
            _YES, settings="primary",
        ),
        "moved": _listing(_MOVED, _MOVES),
        "undo": _word(
            "undo the last decision about who answers", "decision:undo",
            _DRY_RUN, _WAIT_FOR, _AT_ONCE, _REASON, _YES, settings="primary",
        ),
        "topology": _word("which server is primary since when, and which relays follow", "topology:show"),
        "audit": _word(
            "the changes made by operators, newest first", "audit:listing",
            _option("--since", metavar="TIME", help="within this time: 90s, 5m, 1h, 5d"),
        ),
        "queue": _group("the waiting copies: summary, list, flush and more", _QUEUE),
        "failed": _group("the copies that could not be delivered: list, retry and more", _FAILED),
        "divergence": _listing(_DIVERGENCE, _DIVERGENCES),
        "hash-password": _word(
            "read a password and write its hash for a users file", "credentials:hash_password",
            settings="", output=False,
        ),
        "new-key": _word(
            "write a key for storage.key_file, to FILE or to the screen", "credentials:new_key",
            click.Argument(["file"], metavar="[FILE]", required=False, type=click.Path(dir_okay=False)),
            settings="", output=False,
        ),
        "completion": _word(
            "print the completion script for a shell", "completion:script",
            click.Argument(["shell"], metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"])),
            settings="", output=False,
        ),
        "complete": _word(
            "print the completions of a command line, for these scripts", "completion:complete",
            click.Argument(["shell"]), click.Argument(["words"], nargs=-1, type=click.UNPROCESSED),
            settings="", output=False, hidden=True,
        ),
        "help": _word(
            "help on a command, or: settings, filters, man", "help:show",
            click.Argument(["topic"], metavar="[TOPIC]...", nargs=-1, type=Names(TOPIC)), settings="", output=False,
        ),
        "version": _word("print the version", "help:version", settings="", output=False),
    },
    [click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, help="print the version",
                  callback=lambda ctx, _param, value: _version(ctx) if value else None)],
)  # fmt: skip

ROOT.lesser = frozenset({
    "relay", "workers", "demo", "open", "probe", "reload", "undo", "topology", "audit", "release", "throttle", "route",
    "move", "moved", "flow", "hash-password", "new-key", "completion", "version",
})  # fmt: skip


def _version(ctx: click.Context) -> None:
    click.echo(f"{NAME} {__version__}")
    ctx.exit()


def parse(words: Iterable[str]) -> Task | int:
    """Parse a command line; returns the task, or the exit status if nothing is left to do. Raises click.UsageError."""
    result: Task | int = ROOT.main(list(words), NAME, standalone_mode=False, obj=Given())
    return result


def path(words: Sequence[str]) -> click.Context:
    """Return the context of a command, for its help. Raises click.UsageError."""
    ctx = click.Context(ROOT, info_name=NAME, **HELP_OPTIONS)
    for n, word in enumerate(words):
        if not isinstance(ctx.command, CommandGroup):
            raise click.UsageError(f"{ctx.command_path} has no commands", ctx)
        _, command, _ = ctx.command.resolve_command(ctx, list(words[n:]))
        assert command is not None  # noqa: S101 - else resolve_command raises
        ctx = click.Context(command, parent=ctx, info_name=word, **HELP_OPTIONS)
    return ctx
