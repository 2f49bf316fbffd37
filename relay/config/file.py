"""Reads a settings file, TOML or YAML, into plain dicts, with the line of each key.

The only importer of dynaconf, used for nothing but reading the file. dynaconf is large, so loader.py imports this
module only if there is a file. A file that cannot be used raises UnreadableFile, whose text has no secret.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dynaconf import Dynaconf
from dynaconf.constants import TOML_EXTENSIONS
from dynaconf.loaders import yaml_loader
from dynaconf.loaders.base import BaseLoader
from dynaconf.vendor.ruamel.yaml import YAMLError
from dynaconf.vendor.ruamel.yaml.constructor import DuplicateKeyError

from relay.config.options import SECTIONS, TABLES
from relay.mail.text import printable


class UnreadableFile(Exception):
    """A file that cannot be read or parsed; the text is one line."""


class FileContent(NamedTuple):
    """The settings of one file, and the line of each."""

    data: dict[str, Any]
    lines: dict[str, int]  # "section.key" or "backup[0].field" -> line


def read(path: Path) -> FileContent:
    """Read a TOML or YAML file with dynaconf. Raises UnreadableFile."""
    if path.suffix not in {".toml", ".yaml", ".yml"}:
        raise UnreadableFile("expected a file that ends in .toml, .yaml or .yml")
    # The loader is called directly: Dynaconf(settings_files=...) would also read settings.local.toml, includes and
    # hooks, and cast "@format {env[...]}". No folder is searched and no variable is read.
    box = Dynaconf(
        settings_files=[], loaders=[], core_loaders=[], preload=[], includes=[], environments=False, load_dotenv=False,
        auto_cast=False, merge_enabled=True, dotted_lookup=False, envvar_prefix=False, sysenv_fallback=False,
    )  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor may have written a byte order mark
        before = set(box.as_dict())
        if path.suffix == ".toml":
            _toml(box).load(filename=str(path.absolute()), key=None, silent=False)
        else:
            yaml_loader.load(box, filename=str(path.absolute()), silent=False)
        data = {key: value for key, value in box.as_dict().items() if key not in before}
        loaded = {key for source, keys in box.loaded_by_loaders.items() if source.identifier == str(path.absolute())
                  for key in keys}  # fmt: skip
    except OSError as error:
        raise UnreadableFile(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UnreadableFile("is not UTF-8") from None
    except (ValueError, YAMLError, DuplicateKeyError) as error:
        raise UnreadableFile(f"cannot be read: {_syntax(error)}") from None
    except (AttributeError, TypeError):  # a list or a single word where sections are expected
        raise UnreadableFile("expected sections with options") from None
    data |= dict.fromkeys(sorted(loaded - set(data)), True)  # dynaconf's own options are unknown here
    lowered = {str(key).lower(): _lower(value) for key, value in data.items()}
    told = {key: value for key, value in lowered.items() if value or key not in {*SECTIONS, *TABLES}}
    return FileContent(told, dict(_lines(text, path.suffix)))


def _toml(box: Dynaconf) -> Any:
    """Return dynaconf's TOML loader, changed to accept a file that begins with a byte order mark."""
    return BaseLoader(
        obj=box, env=None, identifier="toml", extensions=TOML_EXTENSIONS, validate=False,
        file_reader=lambda file: tomllib.loads(file.read()), string_reader=tomllib.loads,
        opener_params={"mode": "r", "encoding": "utf-8-sig", "newline": ""},
    )  # fmt: skip


def _lower(value: Any) -> Any:
    """Return the value with plain dicts and lower-case keys at every depth."""
    if isinstance(value, dict):
        return {str(key).lower(): _lower(item) for key, item in value.items()}
    return [_lower(item) for item in value] if isinstance(value, list) else value


def _syntax(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return printable(str(error).partition("\n")[0])
    text = (getattr(error, "problem", "") or "not YAML").partition(" with value")[0]  # the value may be a secret
    return f"{printable(text)} (at line {mark.line + 1}, column {mark.column + 1})"


def _lines(text: str, suffix: str) -> Iterator[tuple[str, int]]:
    """Yield each key and its line; multi-line values are not parsed, which is good enough for messages."""
    section, tables, dashes = "", dict.fromkeys(TABLES, -1), dict[str, str]()  # dashes: how far each list is indented
    for number, line in enumerate(text.lower().splitlines(), 1):
        if suffix == ".toml":
            header = re.match(r"\s*(\[\[?)\s*\"?([\w.-]+)", line)
            key = re.match(r"\s*\"?([\w.-]+)\"?\s*=", line)
            starts_table = bool(header) and header[1] == "[[" if header else False
            name = header[2] if header else ""
        else:
            header = re.match(r"(\")?([\w.-]+)\"?\s*:", line)
            within, dash = section.partition("[")[0], re.match(r"(\s*)-\s", f"{line} ")
            starts_table = within in TABLES and dash is not None and dashes.setdefault(within, dash[1]) == dash[1]
            key = re.match(r"\s+(?:-\s+)?\"?([\w.-]+)\"?\s*:", line)
            name = header[2] if header else section.partition("[")[0]
        table, dot, part = name.partition(".")
        if starts_table:
            tables[name] = tables.get(name, -1) + 1
            section = f"{name}[{tables[name]}]"
            yield section, number
        elif header and dot and table in tables:  # [route.match]: of the [[route]] above it
            section = f"{table}[{tables[table]}].{part}"
            yield section, number
        elif header:
            section = name
            yield section, number
        if key:
            yield (f"{section}.{key[1]}" if section else key[1]), number
