"""What every command says of a product with copies of every fate, long names and a hostile server.

With `--json` it is one JSON object a line, whose fields are those that docs/json.md names; on a terminal of 80 columns
no line is longer, and nothing reaches the terminal that steers it.
"""

from __future__ import annotations

import json
import re
import smtplib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import pytest

from relay.command import commands, main
from relay.command.command_factory import JSON
from relay.command.output import cells_of
from relay.json_text import json_text
from support.json_fields import Fields, documented
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer
from support.terminal import Terminal
from support.waiting import wait_until

_SETTINGS = """
state_dir = "{folder}/state"
[smtp]
listen = "127.0.0.1:{smtp_port}"
processes = 1
[status]
listen = "127.0.0.1:{status_port}"
[relay]
destination_primary = "old={old}"
[[backup]]
name = "new"
url = "{new}"
[[backup]]
name = "away"
url = "127.0.0.1:1"
[[server]]
name = "shop"
url = "{shop}"
[[server]]
name = "{long}"
url = "127.0.0.1:2"
[[route]]
name = "shop"
match = {{ recipients = ["@shop.example"] }}
primary = {{ shop = 3, old = 1 }}
copies = "others"
[[route]]
name = "pilot"
match = {{ recipients = "file:{folder}/pilot" }}
primary = "new"
backups = ["old", "{long}"]
[ready]
check_every = "1s"
"""
_WAITING = ("late@a.example", "late2@a.example")
_LONG = "a-server-with-a-name-of-sixty-three-letters-which-is-the-longest"
_FAILED = ("bad@a.example", "bad2@a.example", f"bad.{'y' * 60}@{'long-label.' * 12}a.example")
_FINE = ("ann@a.example", "buyer@shop.example", "pilot@a.example")


@dataclass
class Site:
    """A running product with three servers, two routes, and copies of every fate."""

    product: Product
    settings: Path

    def run(self, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]], str]:
        status = main.run([*line.split(), "--json", "--config", str(self.settings)])
        said = capsys.readouterr()
        assert not re.search(r"frozenset|\{'|\['|<[\w.]+ object|[( ]\w+\([\w]+=|datetime\.|PosixPath", said.out), line
        return status, [json.loads(text, parse_constant=pytest.fail) for text in said.out.splitlines()], said.err

    def unfit(self, line: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """Run it on a terminal of 80 columns; yield the lines that do not fit, or would steer it."""
        with monkeypatch.context() as patch:
            screen = Terminal(80, patch)
            main.run([*line.split(), "--config", str(self.settings)])
        text = re.sub(r"\x1b\[[0-9;]*m", "", screen.text)  # colours
        for shown in text.splitlines():
            if cells_of(shown) > 80 and " " in shown.strip():  # a word alone, such as a link, is the terminal's to fold
                yield f"{cells_of(shown)} columns: {shown}"
            if not shown.isprintable():
                yield f"it steers the terminal: {shown!r}"
        if not text.strip():
            yield "nothing"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("json")
    refusing = {"RCPT TO:<bad": f"550 5.1.1 no such mailbox {_HOSTILE}", "RCPT TO:<late": f"451 4.7.1 later {_HOSTILE}"}
    with ExitStack() as ends:
        old, shop = (ends.enter_context(ScriptedServer({"RCPT TO:<no": "550 5.1.1 no"})) for _ in "12")
        new = ends.enter_context(ScriptedServer(refusing))
        product = Product(folder, primary="", settings={"retry.first": "1h", **QUICK})
        settings = folder / "smtp-dup.toml"
        text = _SETTINGS.format(
            folder=folder, old=old.address, new=new.address, shop=shop.address, smtp_port=product.smtp_port,
            status_port=product.status_port, long=_LONG,
        )  # fmt: skip
        settings.write_text(text + '[retry]\nfirst = "1h"\nlongest = "1h"\n')
        (folder / "pilot").write_text("pilot@a.example\n")
        (folder / "known").write_text(f"{_FAILED[0]}\n{_FAILED[2]}\nann@a.example\nbuyer@shop.example\n")
        (folder / "more").write_text("eve@a.example\nno address\n")
        product.settings = {key: value for key, value in product.settings.items() if key in _OF_A_TEST}
        product.flags = ("--config", str(settings))
        ends.enter_context(product)
        with smtplib.SMTP("127.0.0.1", product.smtp_port) as client:
            for address in (*_WAITING, *_FAILED, *_FINE, "nobody@a.example"):
                with suppress(smtplib.SMTPRecipientsRefused):
                    client.sendmail("s@a.example", [address], "Subject: x\r\nMessage-ID: <x@a.example>\r\n\r\nx\r\n")
        yield Site(product, settings)


# 500 octets as no server should reply: control characters, other directions of text, wide letters, a long word.
_HOSTILE = ("\x1b]0;owned\x07\x1b[2J\x1b[31m \u202e \t Überprüfung 広い " + "x" * 130 + " word" * 80)[:480]

_OF_A_TEST = {"status.listen", "log.format", "log.level", "spool.min_free", "storage.key_file"}

# In this order: what a line does is seen by the next. {..} are filled in from what was said before.
_LINES = """
queue summary
queue list --destination new
queue list --uncertain
queue show {waiting}
queue flush {waiting} --dry-run
queue drop {waiting} --dry-run
failed list
failed show {failed}
failed retry {failed} --dry-run
failed drop {failed} --dry-run
failed export {failed} {folder}/out --dry-run
failed export {failed} {folder}/out
failed retry {failed} --wait
divergence
divergence --by domain
divergence --by recipient
divergence --by day
divergence show {key}
divergence ack {key} --note why
divergence --all
divergence unack {key}
divergence retry {key}
check
probe new --recipients {folder}/known --rate 1000/s
probe shop --recipients {folder}/known --route shop --rate 1000/s
ready new
ready ann@a.example
flow --hours 2
flow --route shop
top --once
trace
open
reload
reload --dry-run
topology
route list
route ann@a.example
route buyer@shop.example
promote new --dry-run
promote new --now --force --reason why --yes
undo --yes
undo --yes
route weight shop shop=9 old=1 --now --yes
route reset shop --yes
route reset shop --yes
promote --cancel
move ann@a.example --file {folder}/more --to new --force --note why --yes
move bob@a.example --to new --dry-run --check
moved
moved show ann@a.example
ready --moved
move ann@a.example --back --yes
move --repair
move --all --dry-run --to new
topology
audit
hold away --reason why --for 1h
throttle new --rate 50/s
throttle new --off
release away
queue flush {waiting}
queue flush --destination new
queue move away new
queue drop {waiting} --yes
failed drop {failed} --yes
queue verify
queue forget nobody
""".strip().splitlines()


def test_every_field_is_as_documented_and_every_text_fits(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that has `--json`: no traceback, nothing as Python writes it, and types as docs/json.md says.

    Those that change nothing are run on a terminal, too.
    """
    names = {"folder": str(site.settings.parent)}

    def is_settled() -> bool:
        _, rows, _ = site.run("queue summary", capsys)
        new = {row["destination"]: row for row in rows}.get("new", {})
        _, groups, _ = site.run("divergence", capsys)
        _, hours, _ = site.run("flow --hours 2", capsys)
        counted = sum(hour["accepted"] for hour in hours)
        return (new.get("retrying"), new.get("failed"), len(groups), counted) == (2, 3, 2, 8)

    wait_until(is_settled, interval=0.5)
    seen: set[tuple[str, str]] = set()
    faults: list[str] = []
    for line in _LINES:
        status, rows, errors = site.run(line.format_map(names), capsys)
        if not (status in {0, 1} and rows) and line not in _SILENT:
            faults.append(f"{line}: {status} {errors}")
        for row in rows:
            key, fields = _documented(line, row)
            seen.add(key)
            faults += [f"{line}: {fault}" for fault in fields.faults(row)]
        if line.split()[0] in _ONLY_SHOW or "--dry-run" in line or line in _SHOW:
            faults += [f"{line}, on a terminal: {fault}" for fault in site.unfit(line.format_map(names), monkeypatch)]
        _remember(names, line, rows)
    assert not faults, "\n".join(dict.fromkeys(faults))
    assert {command for command, _ in seen} >= {command for command, _ in documented()} - _ELSEWHERE


_ONLY_SHOW = {"check", "probe", "ready", "flow", "top", "trace", "topology", "moved", "audit"}
_SHOW = {
    "queue summary", "queue list --destination new", "queue list --uncertain", "queue show {waiting}", "failed list",
    "failed show {failed}", "divergence", "divergence --by domain", "divergence --by recipient",
    "divergence --by day", "divergence show {key}", "divergence --all", "open", "route list", "route ann@a.example",
    "route buyer@shop.example",
}  # fmt: skip
_SILENT = {"queue list --uncertain", "queue forget nobody", "queue verify", "undo --yes"}
_ELSEWHERE = {"times", "about a route", "queue list --uncertain", "queue verify", "queue forget"}


def _remember(names: dict[str, str], line: str, rows: list[dict[str, Any]]) -> None:
    if line.startswith("queue list --destination"):
        names["waiting"] = rows[0]["id"]
    elif line == "failed list":
        names["failed"] = rows[0]["id"]
    elif line == "divergence":
        names["key"] = next(row["key"] for row in rows if row["kind"] == "refused")


def _documented(line: str, row: dict[str, Any]) -> tuple[tuple[str, str], Fields]:
    """Return the row of the docs that an object belongs to."""
    known = documented()
    line = re.sub(r"--by (recipient|day)", "--by domain", line).replace("--moved", "a@b")
    line = re.sub(r"^(undo|route weight|route reset)\b", "promote", line)
    words = line.split()
    if "--wait" in words and "outcome" not in row:
        words.remove("--wait")
    plain = [word for word in words if not word.startswith(("--", "{"))]
    names = [" ".join(plain[:count]) for count in (2, 1)]
    if any("@" in word for word in plain[1:2]) and plain[0] in {"route", "ready"}:
        names = [f"{plain[0]} ADDRESS"]
    if line.startswith("move --all"):
        names.append("promote")
    flags = [word for word in words if word.startswith("--")]
    flagged = [f"{name} {' '.join(flags[:1] + words[words.index(flags[0]) + 1 :][:1])}" for name in names if flags]
    flagged += [f"{name} {flag}" for name in names for flag in flags]
    kind = row.get("kind", "")
    for name in (*flagged, *names):
        for key in ((name, kind), (name, "")):
            if key in known:
                return key, known[key]
    return ("", ""), Fields()


def test_every_command_is_tried_and_documented() -> None:
    """Whatever has the flag has a line above and a row in docs/json.md."""
    tried = [line.split() for line in _LINES]
    lacking = [
        " ".join(path)
        for path in _with_json(commands.ROOT)
        if not any(words[: len(path)] == list(path) for words in tried) and path != ("route", "show")
    ]
    assert lacking == []


def _with_json(group: click.Group, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        path = (*names, name)
        if JSON in command.params and not (isinstance(command, click.Group) and name == "list"):
            yield path if path != ("moved", "list") else ("moved",)
        if isinstance(command, click.Group):
            yield from _with_json(command, path)


def test_what_has_no_form_in_json_is_refused() -> None:
    """A set is a sorted list, a number that JSON does not have is null, anything else is an error of ours."""
    assert (
        json_text({"a": frozenset("ba"), "b": MappingProxyType({"c": {2, 1}})})
        == '{"a": ["a", "b"], "b": {"c": [1, 2]}}'
    )
    assert (
        json_text({"a": [float("nan"), {"b": float("inf")}], "c": {float("-inf")}})
        == '{"a": [null, {"b": null}], "c": [null]}'
    )
    for value in (object(), Path("x"), b"x", ValueError("x"), {"a": [range(3)]}):
        with pytest.raises(TypeError, match="has no form in JSON"):
            json_text(value)
