"""`completion`: the script for a shell, and what it asks at each press of the key.

Commands, flags and the words that a setting may be come from the commands themselves, names and ids from
completed_names.py. A completion never fails, and never says why.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from click.shell_completion import CompletionItem, ShellComplete

from relay.command import command_line, commands
from relay.command.exit_status import WELL
from relay.command.flags import Given

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
    front, equals, _ = word.partition("=")
    prefix = front + equals if equals and word.startswith("--") else ""
    found = ShellComplete(commands.ROOT, {"obj": Given()}, command_line.NAME, "").get_completions(list(before), word)
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
