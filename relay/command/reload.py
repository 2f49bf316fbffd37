"""`reload`: has what runs here take the settings of its file and environment, and says what came of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from relay.command.command_line import tell
from relay.command.exit_status import CANNOT_SAY, NO, USAGE, WELL, Trouble, read_flag
from relay.command.flags import Given
from relay.command.output import Column, Output
from relay.config.loader import SettingsError, default_state_dir, load
from relay.config.options import BY_KEY
from relay.config.types import duration
from relay.daemon import control
from relay.daemon.control import Line, Silent
from relay.ledger.audit import operator

_CHANGES = [
    Column("option", lambda r: r["key"]),
    Column("now", lambda r: r["before"] or "-", detail=True),
    Column("then", lambda r: r["after"] or "-", detail=True),
]
_WORST = (WELL, NO, CANNOT_SAY, USAGE)  # of several answers the last in this order counts


def reload(given: Given, out: Output, *, dry_run: bool, wait: str, allow_empty: bool) -> int:
    """Ask each smtp-dup that runs with this state folder. Raises SettingsError, Trouble."""
    seconds = read_flag("--wait", duration(zero=True).read, wait)
    fault: SettingsError | None = None
    try:
        state_dir = given.settings(require_primary=False).state_dir
    except SettingsError as error:  # what runs will say so, too, if it is about its settings
        fault, state_dir = error, _state_dir(given)
    with control.lines(state_dir) as lines:
        if not lines:
            raise fault or Trouble(f"nothing runs with the state folder {state_dir}: see state_dir")
        statuses = [_ask(line, out, seconds, dry_run=dry_run, allow_empty=allow_empty) for line in lines]
    return max(statuses, key=_WORST.index)


def _state_dir(given: Given) -> Path:
    """Return the state folder that flags or variables name, also beside faults."""
    option = BY_KEY["state_dir"]
    flags = {option.key: given.flags[option.key]} if option.key in given.flags else {}
    environ = {name: os.environ[name] for name in option.variables if name in os.environ}
    try:
        return load(flags, environ=environ or {option.variables[0]: str(default_state_dir(os.environ))},
                    directories=(), require_primary=False).state_dir  # fmt: skip
    except SettingsError:
        return default_state_dir(os.environ)


def _ask(line: Line, out: Output, seconds: float, *, dry_run: bool, allow_empty: bool) -> int:
    try:
        line.ask({"ask": "reload", "dry_run": dry_run, "who": operator(), "allow_empty": allow_empty})
        answer = line.hear(seconds + control.PATIENCE)
        if answer is None:
            tell(f"`{line.role}` does not answer")
            return CANNOT_SAY
        status = _show(answer, out, dry_run=dry_run)
        if answer.get("begins"):
            status = _wait(line, out, seconds)
    except Silent as error:
        tell(f"`{line.role}`: {error}")
        return CANNOT_SAY
    return status


def _show(answer: Mapping[str, Any], out: Output, *, dry_run: bool) -> int:
    """Show what is to change, or why nothing does."""
    if refused := answer.get("refused"):
        _result(out, answer, taken=False, reason=str(refused))
        return NO
    if problems := [str(problem) for problem in answer.get("problems", ())]:
        for problem in problems:
            tell(problem)
        _result(out, answer, taken=False, reason="; ".join(problems), text="Nothing has changed.")
        return USAGE
    changes, left = _rows(answer, "changes"), _rows(answer, "takes_restart")
    _list(out, changes, left)
    if dry_run:
        _result(out, answer, taken=False, text="Nothing was done." if changes else "There is nothing to reload.")
    elif not changes:
        text = f"No {'other ' if left else ''}setting has changed. Certificate, users, keys and tables are read again."
        _result(out, answer, taken=True, text=text)
    return WELL


def _list(out: Output, changes: list[dict[str, Any]], left: list[dict[str, Any]]) -> None:
    if out.as_json:
        for kind, rows in (("change", changes), ("takes_restart", left)):
            for row in rows:
                out.object({**row, "kind": kind})
        return
    if changes:
        out.rows(changes, _CHANGES, nothing="")
    for row in left:
        out.line(f"takes a restart: {row['key']} ({row['before']} -> {row['after']})")


def _wait(line: Line, out: Output, seconds: float) -> int:
    """Wait until the new processes have taken over."""
    ended = line.hear(seconds)
    if ended is None:
        line.ask({"ask": "state"})
        state = line.hear() or {}
        late = [p for p in _rows(state, "processes") if not p.get("ready") and not p.get("leaving")]
        names = ", ".join(f"{p.get('name')} (process {p.get('pid')})" for p in late)
        reason = f"not all are ready after {seconds:g} s: {names or 'asked again, all are'}; it goes on"
        _result(out, state, taken=False, reason=reason)
        return NO
    if not ended.get("taken"):
        _result(out, ended, taken=False, reason=f"nothing has changed: {ended.get('reason')}")
        return NO
    processes = _rows(ended, "processes")
    stay = [p for p in processes if not p.get("leaving")]
    leave = len(processes) - len(stay)
    if out.as_json:
        for process in processes:
            out.object({**process, "kind": "process"})
    text = f"Generation {ended.get('generation')}: {', '.join(str(p.get('name')) for p in stay)}."
    if leave:
        text += f" {leave} former {'process finishes what it has' if leave == 1 else 'finish what they have'} in hand."
    _result(out, ended, taken=True, text=text)
    return WELL


def _result(out: Output, state: Mapping[str, Any], *, taken: bool, reason: str = "", text: str = "") -> None:
    if out.as_json:
        fields = {key: state.get(key) for key in ("role", "generation")}
        out.object({"kind": "result", **fields, "taken": taken, "reason": reason})
    elif text:
        out.line(text)
    else:
        tell(reason)


def _rows(answer: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = answer.get(key)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, Iterable) else []
