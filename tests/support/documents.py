"""The documentation as data: every fenced block with what is to be done with it, every piece of inline code.

The block's language says it; an HTML comment right above it, `<!-- test: WORDS -->`, says more:

    toml, yaml    read as settings; a yaml that is something else is told by its keys
    sh            bash's syntax, and every smtp-dup command in it by the command's own parser
    run STATUS    (sh) run against a running product as well; STATUS is its exit status, 0 unless given
    up            (sh) starts the product, which then relays and copies
    postfix S F   a piece of Postfix's file F; the pieces of one scenario S make an instance
    exim S        a piece of an Exim configuration
    proxy S F     the configuration F of a proxy S in front of IMAP
    unit NAME     (ini) a drop-in for that unit
    install       (sh) run by .ci/run, in an environment of its own
    backup, manifest, kustomize, kustomize-redis, redis.conf, plist   each has its own test
    text, no language and no marker           a picture or output: nothing is done
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relay.command.commands import ROOT as ROOT_GROUP

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKERS = {
    "",
    "run",
    "up",
    "postfix",
    "exim",
    "exim-fallback",
    "proxy",
    "unit",
    "backup",
    "manifest",
    "kustomize",
    "kustomize-redis",
    "mend-redis",
    "redis.conf",
    "install",
    "plist",
}
LANGUAGES = {"", "text", "sh", "toml", "yaml", "ini", "json", "xml", "nginx"}

_FENCE = re.compile(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- test: (.*?) -->\s*$")
_WORDS = set(ROOT_GROUP.commands)


@dataclass(frozen=True)
class Block:
    """One fenced block. ``words`` are its marker's, at least one."""

    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def kind(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> Iterator[Block]:
    """Yield every fenced block of README.md and docs."""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for found in _FENCE.finditer(page):
            before = page[: found.start()]
            comment = _COMMENT.search(before)
            words = tuple(comment[1].split()) if comment else ("",)
            yield Block(path.name, before.count("\n") + 1, found[2], words, found[3])


def of(kind: str, *, page: str = "") -> list[Block]:
    """Return the blocks with this marker."""
    return [block for block in blocks() if block.kind == kind and page in {"", block.page}]


def pieces(page: str, scenario: str) -> dict[str, str]:
    """Return the files of one scenario of a page: "master.cf" -> text."""
    found = [block for block in blocks() if block.page == page and block.words[1:2] == (scenario,) and block.words[2:]]
    return {block.words[2]: block.text for block in found}


def inline() -> Iterator[tuple[str, str]]:
    """Yield (page, code) for each piece of code within a sentence."""
    for path in PAGES:
        rest = _FENCE.sub("", path.read_text(encoding="utf-8"))
        for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest):
            yield path.name, code.replace("\n", " ")


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every smtp-dup command in a piece of shell, without the program's own name."""
    text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", text.replace("\\\n", " "), flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        yield from _commands(list(lexer))


def _commands(tokens: list[str]) -> Iterator[list[str]]:
    simple: list[str] = []
    for token in [*tokens, ";"]:
        if not set(token) <= set("();<>|&"):
            simple.append(token)
            continue
        words = list(simple)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            del words[0]
        for position, word in enumerate(words):
            is_ours = word.rpartition("/")[2] == "smtp-dup"
            if is_ours and (position == 0 or _WORDS & set(words[position + 1 : position + 2])):
                yield words[position + 1 :]
                break
        # What follows > is a file's name, and what follows | or && another command: neither belongs to this one.
        simple = ["<file>"] if set(token) & set("<>") else []
