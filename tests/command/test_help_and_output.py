"""The command line as the operator sees it: help, suggestions, completion, the manual page, tables."""

from __future__ import annotations

import json
import os
import pty
import re
import runpy
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import redis

import relay
from relay.command import command_line, commands, completion, exit_status, manual
from relay.command.flags import SETTINGS_FLAGS
from relay.command.main import run
from relay.command.output import Column, Output, cells_of, fold, wants_colour
from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, OPTIONS
from support.documents import ROOT
from support.product import Product
from support.scripted_server import ScriptedServer
from support.terminal import Terminal
from support.waiting import free_port

SOURCE = str(Path(relay.__file__).parents[1])
COMMAND = [sys.executable, "-m", "relay.command"]


def paths(group: click.Group = commands.ROOT, names: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command and group."""
    yield names
    for name in group.list_commands(click.Context(group)):
        command = group.commands[name]
        if isinstance(command, click.Group):
            yield from paths(command, (*names, name))
        else:
            yield (*names, name)


def words_of(path: tuple[str, ...]) -> list[str]:
    """Return a command line that is right but for what it names."""
    command = commands.path(path).command
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = [*path, *("x" + str(n) for n, p in enumerate(arguments) if p.name != "topic")]
    return [*words, "--yes"] if any("--yes" in p.opts for p in command.params) else words


LEDGER = [p for p in paths() if p[:1] in (("queue",), ("failed",)) and len(p) > 1]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SMTP_DUP_", "NO_COLOR"))}
    return {**kept, "PYTHONPATH": SOURCE, **more}


# Help


@pytest.mark.parametrize("path", list(paths()), ids=" ".join)
def test_help_fits_a_screen(path, monkeypatch):
    """80x24 with the prompt below it; no settings flag, but where they are; the exit statuses."""
    monkeypatch.setenv("COLUMNS", "80")
    text = commands.path(path).get_help().splitlines()
    assert len(text) <= 23
    assert max(map(len, text)) <= 80
    params = commands.path(path).command.params
    own = {flag for param in params if param not in SETTINGS_FLAGS for flag in param.opts}  # `route --listen`
    flags = {flag for option in SETTINGS_FLAGS for flag in option.opts} - own
    assert not flags & set(re.findall(r"--[\w-]+", "\n".join(text)))
    assert exit_status.IN_A_LINE in text
    has_settings = any(param in SETTINGS_FLAGS for param in params)
    assert (command_line.SETTINGS_HINT in text) == has_settings


@pytest.mark.parametrize("path", [p for p in paths() if p], ids=" ".join)
def test_help_is_asked_for_in_two_ways(path, capsys):
    """`help queue list` is `queue list --help`; neither does anything, nor needs anything."""
    assert run([*path, "--help"]) == 0
    by_flag = capsys.readouterr().out
    assert run(["help", *path]) == 0
    assert capsys.readouterr().out == by_flag
    assert run([*path, "-h"]) == 0


def test_help_settings_has_each_setting_once(capsys):
    """Names, variable, default and meaning of every option, and the fields of a backup."""
    assert run(["help", "settings"]) == 0
    text = capsys.readouterr().out
    joined = " ".join(text.split())
    for option in OPTIONS:
        for flag in option.flags:
            assert len(re.findall(rf"(?m)^  .*{flag} X", text)) == 1, flag
        facts = f"{option.key}, {option.variables[0]}, default {json.dumps(option.default)}"
        assert " ".join(facts.split()) in joined
    for field in BACKUP_FIELDS:
        assert f"  {BACKUP_FLAGS[field.key]} NAME=X" in text
    assert max(map(len, text.splitlines())) <= 80
    assert run(["help", "settings", "retry"]) == 0
    assert "--smtp-listen" not in (few := capsys.readouterr().out)
    assert few.count("--retry-") == 3


# Suggestions


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("chek", "check"),
        ("queue lst", "list"),
        ("failed retri x", "retry"),
        ("list", "queue list or failed list"),
        ("help queue lst", "list"),
        ("queue list --destinaton new", "--destination"),
        ("up --smtp-lisen :25", "--smtp-listen"),
        ("--primry x up", "--primary"),
        ("up --backup-tsl new=verify", "--backup-tls"),
        ("up --set smtp.max_hopps=3", "smtp.max_hops"),
        ("up --primary a:25 --backup new=b:25 --backup-tls nwe=verify", "new"),
        ("help settings smtpp", "no setting"),
        ("queue list --color=sometimes", "auto"),
        ("completion tcsh", "bash"),
    ],
)
def test_did_you_mean(line, meant, capsys):
    """Commands, sub-commands, flags, settings, backups: status 2, one line, and what was meant."""
    assert run(line.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    ours = [text for text in told.err.splitlines() if meant in text]
    assert ours
    assert all(text.startswith("smtp-dup: ") for text in told.err.splitlines())


# Exit statuses


@pytest.mark.parametrize("path", LEDGER, ids=" ".join)
def test_without_redis_nobody_can_say(path, tmp_path, capsys, monkeypatch):
    """Status 3 for every command that asks the ledger, and one line with no secret; nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    state = ["--state-dir", str(tmp_path)]
    assert run([*words_of(path), *state, "--redis-url", url]) == 3
    told = capsys.readouterr()
    assert told.err.startswith("smtp-dup: no Redis at redis://:***@127.0.0.1")
    assert told.err.count("\n") == 1
    assert run([*words_of(path), *state]) == 3
    told = capsys.readouterr()
    assert told.err.startswith("smtp-dup: no Redis: set redis.url, or start `smtp-dup up` with this --state-dir")
    assert (told.out, told.err.count("\n")) == ("", 1)


def test_a_redis_that_does_not_answer_is_not_waited_for_long(tmp_path, capsys, monkeypatch):
    """It takes connections and says nothing: status 3 after redis.timeout_seconds, also of check."""
    monkeypatch.chdir(tmp_path)
    with silent_server() as port:
        flags = ["--redis-url", f"redis://127.0.0.1:{port}", "--redis-timeout-seconds", "0.3"]
        flags += ["--state-dir", str(tmp_path)]
        started = time.monotonic()
        assert run(["queue", "summary", *flags]) == 3
        assert time.monotonic() - started < 10
        assert "imeout" in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("words", "waits"), [(("check",), 2), (("route", "ann@a.example"), 1)])
def test_a_redis_that_hangs_costs_one_time_out(tmp_path, capsys, monkeypatch, words, waits):
    """Who waits for it more than once does so at the same time: all connections are there before one is over."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", free_port())) as silent:
        # With this patience, a wait that begins only when another one is over ends the test.
        flags = ["--redis-url", f"redis://127.0.0.1:{silent.getsockname()[1]}", "--redis-timeout-seconds", "600"]
        flags += ["--state-dir", str(tmp_path), "--primary", "old=127.0.0.1:1"]
        taken = []

        def let_go():
            taken.extend(silent.accept()[0] for _ in range(waits))
            for connection in taken:
                connection.close()

        thread = threading.Thread(target=let_go, daemon=True)
        thread.start()
        run([*words, *flags])
        thread.join()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()
    assert len(taken) == waits
    capsys.readouterr()


def silent_server() -> SilentServer:
    return SilentServer()


class SilentServer:
    """A port that takes connections into its backlog and says nothing."""

    def __enter__(self) -> int:
        self._socket = socket.create_server(("127.0.0.1", free_port()))
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def test_check_cannot_say_without_redis(product, primary):
    """3 where only Redis is away; 1 where a server is, too: that is known."""
    away = f"redis://127.0.0.1:{free_port()}/0"
    assert product(start=False, primary=primary.address, redis_url=away).run("check").returncode == 3
    gone = f"127.0.0.1:{free_port()}"
    assert product(start=False, primary=gone, redis_url=away).run("check").returncode == 1


@pytest.mark.parametrize("path", [p for p in paths() if p], ids=" ".join)
def test_wrong_usage_is_2(path, capsys):
    """An unknown flag, for every command; nothing is begun."""
    assert run([*path, "--no-such-flag"]) == 2
    assert capsys.readouterr().err.startswith("smtp-dup: no such option: --no-such-flag")


def test_the_table_in_the_docs_has_them_all():
    """docs/operations.md names every status that there is."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = dict(re.findall(r"(?m)^\| `(\d+)` \| (.+) \|$", text))
    assert set(table) == {str(status) for status in exit_status.MEANINGS}


# Completion


def bash(line: str, cwd: Path, **more: str) -> list[str]:
    """Return what bash would offer for a line, its cursor at the end."""
    program = f"""
    smtp-dup() {{ {sys.executable} -m relay.command "$@"; }}
    . <(smtp-dup completion bash)
    COMP_LINE=$1 COMP_POINT=${{#1}}
    _smtp_dup smtp-dup
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", program, "bash", line],
        env=environment(**more),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("smtp-dup che", ["check"]),
        ("smtp-dup queue l", ["list"]),
        ("smtp-dup failed list --dest", ["--destination"]),
        ("smtp-dup up --log-l", ["--log-level"]),
        ("smtp-dup up --log-level ", ["debug", "info", "warning", "error"]),
        ("smtp-dup queue list --color=n", ["never"]),
        ("smtp-dup --backup new=a:1,10.0.0.1:25 queue list --destination ", ["new", "10.0.0.1:25"]),
        ("smtp-dup --backup new=a:1,10.0.0.1:25 queue list --destination 10.0.0.1:", ["25"]),
        ("smtp-dup --backup new=a:1 queue list --destination=n", ["new"]),
        ("smtp-dup completion ", ["bash", "zsh", "fish"]),
        ("smtp-dup help queue l", ["list"]),
        ("smtp-dup up 'unfinished", []),
        ("smtp-dup nonsense --wrong ", []),
    ],
)
def test_bash_completes(line, offered, tmp_path):
    """Commands, flags, values, names: as bash wants them, which breaks words at : and =."""
    assert bash(line, tmp_path, SMTP_DUP_STATE_DIR=str(tmp_path)) == offered


def test_completion_knows_what_the_ledger_has(product, primary: ScriptedServer, backup: ScriptedServer):
    """Names of destinations that are in no settings, and ids of the failed list."""
    from support.waiting import wait_until

    backup.replies["RCPT TO:<bad@example.com>"] = "550 5.1.1 no"
    instance: Product = product(primary=primary.address, backups=[backup.address])
    instance.send("from@example.com", "bad@example.com")
    wait_until(lambda: instance.summary()["failed"] == 1)
    (row,) = instance.json("failed", "list")

    def offered(line: str) -> list[str]:
        """Ask as a shell does; in a fork, since it offers nothing rather than late, and imports take time, too."""
        return instance.run("complete", "bash", "--", line, "=").stdout.split()

    wait_until(lambda: offered("smtp-dup failed show ") == [row["id"]])
    assert offered(f"smtp-dup failed retry {row['id']} ") == []
    wait_until(lambda: offered("smtp-dup queue flush --destination=127") == [backup.address])
    # What somebody else has put there must not stand on a command line.
    hostile = ["$(reboot)", "x;reboot", "\x1b]0;x\x07", "a\nb", b"\xff"]
    with redis.Redis.from_url(instance.redis_url) as connection:
        connection.zadd(f"smtpdup:failed:{backup.address}", dict.fromkeys(hostile, 1.0))
        connection.hset("smtpdup:destinations", mapping=dict.fromkeys(hostile, "x"))
    wait_until(lambda: offered("smtp-dup failed show ") == [row["id"]])
    wait_until(lambda: offered("smtp-dup queue flush --destination=") == [backup.address])


def test_completion_never_hangs(tmp_path):
    """A Redis that takes connections and says nothing costs a fraction of a second."""
    with silent_server() as port:
        more = {
            "SMTP_DUP_REDIS_URL": f"redis://127.0.0.1:{port}",
            "SMTP_DUP_REDIS_TIMEOUT_SECONDS": "600",  # what it would wait elsewhere
            "SMTP_DUP_RELAY_DESTINATION_BACKUPS": "new=a:25",
        }
        started = time.monotonic()
        assert bash("smtp-dup queue list --destination ", tmp_path, **more) == ["new"]
        assert time.monotonic() - started < 60  # two starts of Python on a busy machine


@pytest.mark.skipif(not shutil.which("fish"), reason="fish is not installed")
def test_fish_completes(tmp_path):
    """A value with its description; files where a file is wanted."""
    (tmp_path / "my.toml").write_text("")
    program = f"""
    function smtp-dup; {sys.executable} -m relay.command $argv; end
    smtp-dup completion fish | source
    complete -C "smtp-dup queue l"
    complete -C "smtp-dup --backup new=a:1,10.0.0.1:25 queue list --destination=1"
    complete -C "smtp-dup --config {tmp_path}/m"
    """
    more = {"HOME": str(tmp_path), "SMTP_DUP_STATE_DIR": str(tmp_path)}
    done = subprocess.run(
        ["fish", "-c", program], env=environment(**more), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "list\tthe waiting copies", "--destination=10.0.0.1:25", f"{tmp_path}/my.toml"
    ]  # fmt: skip


@pytest.mark.skipif(not shutil.which("zsh"), reason="zsh is not installed")
def test_zsh_completes(tmp_path):
    """In a real zsh at a terminal: the key finishes the word, and the command runs."""
    program = tmp_path / "smtp-dup"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m relay.command "$@"\n')
    program.chmod(0o755)
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PS1": "READY> ", "TERM": "dumb"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execvpe("zsh", ["zsh", "-f", "-i"], environment(**more))
    try:
        for line, seen in (
            ("", "READY>"),
            ('autoload -Uz compinit && compinit -u -D && . <(smtp-dup completion zsh) && echo lo""aded\n', "\nloaded"),
            ("smtp-dup vers\t\n", f"smtp-dup {relay.__version__}"),
            ("smtp-dup --backup new=a:1,10.0.0.1:25 queue flush --destination 10.\t --help\n", "10.0.0.1:25"),
        ):
            os.write(terminal, line.encode())
            assert seen in read_until(terminal, seen)
    finally:
        os.close(terminal)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def read_until(terminal: int, text: str, seconds: float = 30) -> str:
    seen = b""
    end = time.monotonic() + seconds
    while text.encode() not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    return seen.decode("utf-8", "replace")


def test_a_script_for_each_shell(capsys):
    """And the shells that are here can read theirs."""
    for shell, text in completion.SCRIPTS.items():
        assert run(["completion", shell]) == 0
        assert capsys.readouterr().out == text
        if shutil.which(shell):
            subprocess.run([shell, "-n"], input=text, text=True, check=True)


# The manual page


def test_the_manual_page_is_that_of_the_commands():
    """`python docs/site/reference.py` would change nothing; every command and setting is in it."""
    made = runpy.run_path(str(ROOT / "docs" / "site" / "reference.py"))["MANUAL"].read_text("utf-8")
    assert made == manual.page(), "run python docs/site/reference.py"
    plain = made.replace("\\-", "-")
    assert all(f"smtp-dup {' '.join(p)}" in plain for p in paths() if p and p not in (("queue",), ("failed",)))
    assert all(flag in plain for option in OPTIONS for flag in option.flags)


LINTERS = (["mandoc", "-T", "lint", "-W", "warning"], ["groff", "-man", "-Tutf8", "-z", "-ww"])


@pytest.mark.parametrize("lint", LINTERS, ids=lambda words: words[0])
def test_the_manual_page_has_no_faults(lint):
    """The linters of mandoc and groff have nothing to say."""
    if not shutil.which(lint[0]):
        pytest.skip(f"{lint[0]} is not installed")
    done = subprocess.run(lint, input=manual.page(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# Tables


COLUMNS = [
    Column("id", lambda r: r[0]),
    Column("destination", lambda r: r[1]),
    Column("recipients", lambda r: r[2], detail=True),
    Column("size", lambda r: r[3], numbers=True),
    Column("last reply", lambda r: r[4], detail=True),
]
ROWS = [
    (
        "k3jh45kj2h3k4j5h",
        "new",
        "someone.with.a.long.name@a-long-domain.example.com",
        "123",
        "450 4.2.0 " + "later " * 40,
    ),
    ("k3jh45kj2h3k4j5i", "10.0.0.1:25", "用户@例え.jp, " * 20, "99999999", "x" * 500),
]


@pytest.mark.parametrize("columns", [20, 80, 2000])
def test_a_table_loses_no_letter(columns, monkeypatch):
    """However narrow the terminal is: every character of every value, in order, and no line too long."""
    screen = Terminal(columns, monkeypatch)
    Output(colour="never").rows(ROWS, COLUMNS, nothing="")
    assert max(cells_of(line) for line in screen.text.splitlines()) <= columns
    squeezed = re.sub(r"\s", "", screen.text)
    for row in ROWS:
        for value in row:
            assert re.sub(r"\s", "", value) in squeezed


@pytest.mark.parametrize("columns", [20, 80, 2000])
def test_names_with_values_lose_no_letter(columns, monkeypatch):
    """What is too wide goes on below its beginning, and is no line of its own; in a pipe and with --wide it is one."""
    pairs = [("route", "shop"), ("note", "löng " * 60), ("", "x" * 300), ("trouble", "広い" * 90), ("", "")]
    screen = Terminal(columns, monkeypatch)
    Output(colour="never").pairs(pairs)
    lines = screen.text.splitlines()
    assert max(cells_of(line) for line in lines) <= columns
    begun = [line for line in lines if line[:15].strip() or line == " " * 13]
    assert [re.sub(r"\s", "", line[:12]) for line in begun] == [name for name, _ in pairs]
    assert re.sub(r"\s", "", screen.text) == re.sub(r"\s", "", "".join(name + value for name, value in pairs))
    screen.text = ""
    Output(wide=True, colour="never").pairs(pairs)
    assert len(screen.text.splitlines()) == len(pairs)


def test_a_wide_table_has_a_line_for_each_row(monkeypatch):
    """With --wide, and in a pipe."""
    screen = Terminal(40, monkeypatch)
    Output(wide=True, colour="never").rows(ROWS, COLUMNS, nothing="")
    assert len(screen.text.splitlines()) == 2 + len(ROWS)
    assert all(value.rstrip() in screen.text for row in ROWS for value in row)


def test_fold_keeps_all():
    """Pieces of at most that width, which are the text again."""
    for text in ("", "word", "a " * 100, "x" * 100, "日本語" * 30, "e\u0301" * 50):
        pieces = fold(text, 10)
        assert all(cells_of(piece) <= 10 for piece in pieces)
        assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", text)


def test_colour_only_where_it_is_wanted(monkeypatch, capsys):
    """In a terminal, not in a pipe; NO_COLOR and dumb terminals; the flag wins."""
    columns = [Column("state", lambda r: r, colour=lambda _: "32")]
    Output(colour="auto").rows(["ok"], columns, nothing="")
    assert "\x1b" not in capsys.readouterr().out
    screen = Terminal(80, monkeypatch)
    Output(colour="auto").rows(["ok"], columns, nothing="")
    assert "\x1b[32mok" in screen.text
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour("auto")
    assert wants_colour("always")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour("auto")
    assert not wants_colour("never")


def test_control_characters_do_not_reach_the_terminal(monkeypatch):
    """Not from a server, not from Redis, and a mark that turns text around neither."""
    screen = Terminal(80, monkeypatch)
    out = Output(colour="never")
    out.rows(["\x1b]0;title\x07\r\n\u202e\x9b31m"], [Column("reply", lambda r: r)], nothing="")
    out.line("\x1b[2J")
    out.pairs([("reply", "\x1b[2J\u2066")])
    assert all(c == "\n" or c.isprintable() for c in screen.text)


def test_twenty_thousand_rows_are_quick(capsys):
    """Laying out a table costs microseconds a row; what reads the ledger is beside it."""
    rows = [("k3jh45kj2h3k4j5h", "new", "someone@example.com", str(n), "450 4.2.0 later") for n in range(20_000)]
    started = time.process_time()
    Output().rows(rows, COLUMNS, nothing="")
    assert time.process_time() - started < 2
    assert capsys.readouterr().out.count("\n") == 20_002


# Unkind surroundings


@pytest.mark.parametrize(
    "line",
    [
        "help settings | head -1",
        "help settings | true",
        "version >&-",
        "version 2>&-",
        "queue 2>&-",
        "--help <&-",
        "hash-password </dev/null",
        "failed drop x </dev/null",
        "help settings >/dev/full",
        "queue list --json | head -0",
    ],
)
def test_no_traceback(line, tmp_path):
    """Pipes that break, no input, no output, a full disk, a C locale, a narrow terminal: a line, or nothing."""
    more = {"LC_ALL": "C", "LANG": "C", "COLUMNS": "40", "SMTP_DUP_STATE_DIR": str(tmp_path), "PYTHONUTF8": "0"}
    command = " ".join(COMMAND)
    done = subprocess.run(
        ["bash", "-c", f"{command} {line}"], env=environment(**more), cwd=tmp_path, capture_output=True, check=False
    )
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_the_start_is_quick(tmp_path):
    """`version`, `--help` and the completion of commands: processor time, for a busy machine has no other."""
    for words in (["version"], ["--help"], ["complete", "bash", "--", "smtp-dup queue "]):
        before = os.times()
        best = min(_cpu(words, tmp_path) for _ in range(3))
        assert best < 0.5, (words, best)
        assert os.times().elapsed - before.elapsed < 60


def _cpu(words: list[str], cwd: Path) -> float:
    before = os.times()
    subprocess.run([*COMMAND, *words], env=environment(), cwd=cwd, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system
