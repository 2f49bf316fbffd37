"""The conditions of the commands that list or change many copies, as flags: the same for all of them.

They are not in the help of each command: `smtp-dup help filters` has them once. What they mean is in filters.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import click

from relay.command.completed_names import DESTINATION, GROUP, Names

HINT = "What each one means: smtp-dup help filters"
_HEAD = """\
Conditions of the commands that list or change many copies. A copy must meet all
that are given. Changing words want at least one, ids, or --all.
"""


def _flag(*names: str, kind: click.ParamType[str] | None = None, metavar: str, text: str) -> click.Option:
    return click.Option(list(names), metavar=metavar, type=kind, help=text, hidden=True, multiple=True)


FILTER_FLAGS: tuple[click.Option, ...] = (
    _flag("--destination", kind=Names(DESTINATION), metavar="NAME", text="only the copies for this backup"),
    _flag("--sender", "--from", "sender", metavar="ADDRESS",
          text="of this sender, or of @domain; <> is the null sender"),
    _flag("--recipient", "--to", "recipient", metavar="ADDRESS",
          text="owed to this recipient, or to one in @domain; of a failed copy, failed for them"),
    _flag("--domain", metavar="DOMAIN", text="owed to a recipient in this domain"),
    _flag("--client", metavar="NET", text="from a client in this network: 192.0.2.7, 10.0.0.0/8, 2001:db8::/32"),
    _flag("--reply", metavar="TEXT", text="the last reply has this text in it"),
    _flag("--code", metavar="CODE", text="the last reply begins with this code, 550 or 5xx, or has the status 5.1.1"),
    _flag("--group", kind=Names(GROUP), metavar="KEY", text="counted in this group of divergence"),
    _flag("--attempts", metavar="N", text="tried so often: 3, '>3' or '<=2'"),
    _flag("--older", "--older-than", "older", metavar="TIME",
          text="received longer ago than 90s, 5m, 1h or 5d; in the failed list, failed longer ago"),
    _flag("--newer", metavar="TIME", text="received, or failed, no longer ago"),
    _flag("--larger", metavar="SIZE", text="of more octets: 64K, 10M"),
    _flag("--limit", metavar="N", text="no more than so many, the oldest first; alone it is no condition"),
)  # fmt: skip
# The conditions that a reason of divergence can meet: it has no sender, client, size or attempts.
REASON_FLAGS = tuple(flag for flag in FILTER_FLAGS if flag.name in {"recipient", "domain", "reply", "code"})
NAMES = tuple(str(flag.name) for flag in FILTER_FLAGS)


def summary(width: int, of: Sequence[click.Parameter]) -> str:
    """Return the flags that a command has of these, in a few lines; where it has few, in one."""
    has_all = FILTER_FLAGS[0] in of
    flags = [f"{f.opts[0]} {f.metavar}" if has_all else f.opts[0] for f in FILTER_FLAGS if f in of]
    head = "Filters" if has_all else "Filters (smtp-dup help filters)"
    words = f"{head}: {', '.join(flag.replace(' ', chr(160)) for flag in flags)}."
    text = textwrap.fill(words, width - 1, break_on_hyphens=False, break_long_words=False).replace("\xa0", " ")
    return text + (f"\n{HINT}\n" if has_all else "\n")


def page(width: int) -> str:
    """Return what `help filters` prints."""
    blocks = [
        f"  {', '.join(f'{name} {flag.metavar}' for name in flag.opts)}\n"
        + "".join(f"      {line}\n" for line in textwrap.wrap(f"{flag.help}.", width - 6, break_on_hyphens=False))
        for flag in FILTER_FLAGS
    ]
    return _HEAD + "\n" + "".join(blocks)
