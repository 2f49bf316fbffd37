"""The tables of docs/configuration.md and docs/environment.md, and the manual page, from relay/config/options.py.

`python docs/site/reference.py` writes them anew, the tables between the two comments that mark each; a test fails while
they differ. Everything else on these pages is written by hand. The manual page is in docs/site/smtp-dup.1, from where
it goes into the wheel.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from relay.command import manual
from relay.config.options import BACKUP_FIELDS, OPTIONS, ROUTE_FIELDS, SECTIONS, Option
from relay.config.settings_toml import as_toml

PAGES = Path(__file__).parents[1]
MANUAL = Path(__file__).with_name("smtp-dup.1")


def _cell(text: str) -> str:
    """Return text that can stand in a table: a bar would end its cell, and a tag would vanish."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _meaning(option: Option) -> str:
    return _cell(option.explained)


def _section(name: str) -> str:
    return name.partition(".")[0] if "." in name else ""


def options() -> Iterator[str]:
    """Yield a heading and a table for each section."""
    section = None
    for option in OPTIONS:
        if _section(option.key) != section:
            section = _section(option.key)
            yield from ("", f"### {section or 'At the top'}", "")
            if section:
                yield from (SECTIONS[section], "")
            yield from ("| option | default | meaning |", "|---|---|---|")
        yield f"| `{option.key}` | `{as_toml(option.default)}` | {_meaning(option)} |"


def backup_fields() -> Iterator[str]:
    """Yield the fields of [[backup]]; what stands as default there is an example for the first two."""
    yield from ("", "| field | default | meaning |", "|---|---|---|")
    for field in BACKUP_FIELDS:
        default = "" if field.key in {"url", "name", "connections"} else f"`{json.dumps(field.default)}`"
        yield f"| `{field.key}` | {default} | {_meaning(field)} |"


def route_fields() -> Iterator[str]:
    """Yield the fields of [[route]], each with an example."""
    yield from ("", "| field | example | meaning |", "|---|---|---|")
    for name, example, text in ROUTE_FIELDS:
        yield f"| `{name}` | `{example}` | {_cell(text)} |"


def variables() -> Iterator[str]:
    """Yield a row for each option: variable, flag, option, default."""
    yield from ("", "| variable | flag | option | default |", "|---|---|---|---|")
    for option in OPTIONS:
        yield f"| `{option.variables[0]}` | `{option.flag}` | `{option.key}` | `{as_toml(option.default)}` |"


TABLES = {"options": options, "backup-fields": backup_fields, "route-fields": route_fields, "variables": variables}


def renew(page: str) -> str:
    """Return a page with each of its tables as relay/config/options.py has it now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        text = "\n".join((begin, *table(), "", end))
        page = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _, text=text: text, page, flags=re.DOTALL)
    return page


def main() -> None:
    """Rewrite the manual page, and the pages that have such tables."""
    MANUAL.write_text(manual.page(), encoding="utf-8")
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = renew(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"{path.name}\n")


if __name__ == "__main__":
    main()
