"""`completion`: the script for a shell, and what it asks at each press of the key.

Commands, flags and the words that a setting may be come from the commands themselves. Names of backups come from the
settings, and names and ids from the ledger where Redis answers at once; whatever is not there in time is left out. A
completion never fails, and never says why.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import click
from click.shell_completion import CompletionItem, ShellComplete

from relay.command.exit_status import WELL
from relay.command.flags import Given

if TYPE_CHECKING:
    from redis import Redis

DESTINATION, FAILED_ID, WAITING_ID, GROUP, TOPIC = "destination", "failed id", "waiting id", "group", "topic"

_ANSWER_SECONDS = 0.2  # for each answer of Redis
_PATIENCE = 0.8  # seconds for all of it, also where a name server is silent
_IDS = 100  # of one destination, the oldest
_FILE = ":file"  # instead of candidates: the shell knows files best

_BASH = r"""# Completion of smtp-dup for bash: . <(smtp-dup completion bash)
_smtp_dup() {
    local found word
    COMPREPLY=()
    found=$("${1/#\~/$HOME}" complete bash -- "${COMP_LINE:0:COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
    if [[ $found == :file ]]; then
        compopt -o default -o filenames 2>/dev/null
    elif [[ $found ]]; then
        while IFS= read -r word; do COMPREPLY+=("$word"); done <<< "$found"
    fi
}
complete -o nosort -F _smtp_dup smtp-dup 2>/dev/null || complete -F _smtp_dup smtp-dup
"""

_ZSH = r"""#compdef smtp-dup
# Completion of smtp-dup for zsh: smtp-dup completion zsh > a folder of $fpath/_smtp-dup
_smtp_dup() {
    local -a found
    found=("${(@f)$(${~words[1]} complete zsh -- "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}")
    if [[ ${found[1]} == :file ]]; then
        _files
    elif [[ -n ${found[1]} ]]; then
        _describe -V 'smtp-dup' found
    fi
}
if [[ ${zsh_eval_context[-1]} == loadautofunc ]]; then
    _smtp_dup "$@"
else
    compdef _smtp_dup smtp-dup
fi
"""

_FISH = r"""# Completion of smtp-dup for fish: smtp-dup completion fish > ~/.config/fish/completions/smtp-dup.fish
function __smtp_dup
    set -l words (commandline -opc)
    set -l token (commandline -ct)
    set -l found ($words[1] complete fish -- $words[2..-1] "$token" 2>/dev/null)
    if test "$found[1]" = :file
        __fish_complete_path "$token"
    else if test -n "$found[1]"
        printf '%s\n' $found
    end
end
complete --command smtp-dup --no-files --keep-order --arguments '(__smtp_dup)'
"""

SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> int:
    """Print the script for a shell."""
    sys.stdout.write(SCRIPTS[shell])
    return WELL


# What a shell asks ----------------------------------------------------------------------------------------------


def complete(shell: str, words: tuple[str, ...]) -> int:
    """Print how a command line may go on, a line each; for bash the line itself and what it breaks words at."""
    with suppress(Exception):  # in the middle of somebody's line is no place for a complaint
        if shell == "bash":
            line, breaks = (*words, "", "")[:2]
            before, word = _split(line)
            cut = 1 + max((word.rfind(mark) for mark in ":=" if mark in breaks), default=-1)
        else:
            *before, word = words or ("",)
            cut = 0
        sys.stdout.writelines(_as_line(shell, item, cut) + "\n" for item in candidates(before, word))
    sys.stdout.flush()
    os._exit(WELL)  # without waiting for a thread that waits for a server


def candidates(before: Sequence[str], word: str) -> list[CompletionItem]:
    """Return what a word may become, behind these words. One item of type "file" is any file."""
    from relay.command import commands  # noqa: PLC0415  (it has the names of this module)

    front, equals, _ = word.partition("=")
    prefix = front + equals if equals and word.startswith("--") else ""
    found = ShellComplete(commands.ROOT, {"obj": Given()}, commands.NAME, "").get_completions(list(before), word)
    if any(item.type == "file" for item in found):
        return [CompletionItem(word, type="file")]
    return [CompletionItem(prefix + str(item.value), help=item.help) for item in found]


def _split(line: str) -> tuple[list[str], str]:
    """Return the words behind the command, and the unfinished last one."""
    for ending in ("", "'", '"'):
        with suppress(ValueError):
            words = shlex.split(line + ending)
            if not ending and (not line or line[-1].isspace()):
                words.append("")
            return words[1:-1], words[-1] if len(words) > 1 else ""
    return [], ""


def _as_line(shell: str, item: CompletionItem, cut: int) -> str:
    if item.type == "file":
        return _FILE
    text = " ".join((item.help or "").split())
    if shell == "bash":
        return str(item.value)[cut:]
    if shell == "zsh":
        return str(item.value).replace("\\", "\\\\").replace(":", "\\:") + (f":{text}" if text else "")
    return f"{item.value}\t{text}" if text else str(item.value)


# Names of destinations, ids of messages -------------------------------------------------------------------------


class Names(click.ParamType[str]):
    """A text that is one of some names; which ones is asked for only by completion."""

    name = "text"

    def __init__(self, what: str) -> None:
        self._what = what

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so, without those that are on the command line already."""
        if self._what == TOPIC:
            return _topics(ctx, incomplete)
        given = ctx.find_object(Given)
        already = set(ctx.params.get(param.name or "") or ()) if param.nargs == -1 else set()
        found = names(given, self._what) if given else []
        return [CompletionItem(n) for n in dict.fromkeys(found) if n.startswith(incomplete) and n not in already]


def _topics(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    from relay.command import commands  # noqa: PLC0415  (it has the names of this module)

    within: click.Command = commands.ROOT
    for word in ctx.params.get("topic") or ():
        within = within.commands.get(word, within) if isinstance(within, click.Group) else within
    found = within.list_commands(ctx) if isinstance(within, click.Group) else []
    extra = ["settings", "filters", "man"] if within is commands.ROOT else []
    return [CompletionItem(word) for word in (*extra, *found) if word.startswith(incomplete)]


def names(given: Given, what: str) -> list[str]:
    """Return names of destinations, or ids, as far as they are known in time."""
    found: list[str] = []
    thread = threading.Thread(target=_look, args=(given, what, found.append), daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return list(found)


def _look(given: Given, what: str, add: Callable[[str], Any]) -> None:
    with suppress(Exception):
        settings = given.settings(require_primary=False)
        if what == DESTINATION:
            for backup in settings.backups:
                add(backup.name)
        from relay.ledger import keys as ledger_keys  # noqa: PLC0415  (redis-py: 0.1 s, which other completions do not take)
        from relay.redisio import embedded  # noqa: PLC0415  (redis-py: 0.1 s, which other completions do not take)
        from relay.redisio.clients import sync_client  # noqa: PLC0415  (redis-py)

        server = settings.redis if settings.redis.url else settings.redis.at(embedded.url(settings.state_dir))
        if not settings.redis.url and not embedded.socket_path(settings.state_dir).exists():
            return
        with sync_client(server, _ANSWER_SECONDS, retries=0) as connection:
            destinations = [name.decode() for name in connection.hkeys(ledger_keys.DESTINATIONS)]
            if what == DESTINATION:
                for name in sorted(destinations):
                    add(name)
                return
            lists = {FAILED_ID: ledger_keys.FAILED, WAITING_ID: ledger_keys.PENDING, GROUP: ledger_keys.DIVERGENCE}
            key = lists[what]
            for message_id in _ids(connection, [key + name for name in destinations]):
                add(message_id)


def _ids(connection: Redis, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        for member in connection.zrange(key, 0, _IDS - 1):
            yield cast("bytes", member).decode()
