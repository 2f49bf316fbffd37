"""Writes settings.toml: every option at its default, commented out, with its help.

`python -m relay.config.settings_toml > settings.toml` writes the file again.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap

from relay.config.options import BACKUP_FIELDS, OPTIONS, ROUTE_FIELDS, SECTIONS, Option

_HEAD = """\
# smtp-dup: every option at its default value. Remove the # in front of what you change.
#
# smtp-dup reads the first folder of . and /etc/smtp-dup/ in which a settings.toml or a config.yaml sets anything,
# or only the file given by --config FILE or SMTP_DUP_CONFIG. Then come variables (SMTP_DUP_SMTP_LISTEN or
# SMTP_DUP_SMTP__LISTEN; an empty one counts as not set), then flags. `smtp-dup check` shows each value
# and where it comes from.
#
# Durations: 30 (seconds), 90s, 5m, 1h, 5d. Sizes: 1024 (bytes), 64K, 10M, 1G.
"""


def as_toml(value: object) -> str:
    """Return a default as settings.toml has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {as_toml(item)}" for name, item in value.items()) + "}"
    return json.dumps(value)  # TOML's strings, numbers, booleans and lists of them are written like JSON's


def _explained(option: Option, *, variable: bool) -> list[str]:
    name = f" ({option.variables[0]}, {option.flag})" if variable else ""
    return textwrap.wrap(option.explained + name, 116, initial_indent="# ", subsequent_indent="# ",
                         break_on_hyphens=False)  # fmt: skip


def render() -> str:
    """Return the commented settings.toml, in which every option stands at its default, commented out."""
    lines = [_HEAD]
    section = ""
    for option in OPTIONS:
        head, dot, name = option.key.rpartition(".")
        if dot and head != section:
            section = head
            lines += [f"\n# {SECTIONS[section]}", f"[{section}]", ""]
        lines += [*_explained(option, variable=True), f"# {name} = {as_toml(option.default)}", ""]
    lines += ["", "# A backup with options of its own. Repeat the table for each such backup.", "# [[backup]]"]
    for field in BACKUP_FIELDS:
        lines += [*_explained(field, variable=False), f"# {field.key} = {as_toml(field.default)}"]
    lines += ["", "# A server that only routes name, with the fields of [[backup]].", "# [[server]]"]
    lines += ['#   name = "new"', '#   url = "new.example.com:25"', ""]
    lines += [
        "# Who answers for which mail; the first route that matches counts. Without any, relay.destination_primary"
    ]
    lines += ["# answers for all, and every [[backup]] gets copies. See docs/routes.md.", "# [[route]]"]
    for name, example, text in ROUTE_FIELDS:
        lines += textwrap.wrap(text, 116, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        lines += [f"#   {name} = {example}"]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
