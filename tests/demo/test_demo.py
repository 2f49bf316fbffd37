"""`smtp-dup demo`: shows everything within seconds, with nothing else present, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import smtplib
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from fcntl import ioctl
from pathlib import Path
from typing import IO

import pytest

import relay
from relay.command import commands
from relay.demo.display import coloured_console
from support import forked, running_processes
from support.child_processes import tied
from support.forked import ForkedProcess
from support.waiting import wait_until

OUTCOMES = {
    "A plain message": "delivered",
    "Grüße and a file": "delivered",
    "Old refuses it": "none",
    "Old refuses one": "delivered",
    "New defers it": "delivered",
    "New refuses it": "failed list",
}


_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("SMTP_DUP_") and name != "COLUMNS"},
    "PYTHONPATH": str(Path(relay.__file__).parents[1]),
    "TERM": "xterm",
}
_REAL = [sys.executable, "-m", "relay.command"]  # how the demo names itself where there is no smtp-dup


class Demo:
    """A demo in a session of its own; its output goes to a file, or to a terminal.

    With ``real`` it is a process that Python has just started, as for a user, else a fork.
    """

    process: subprocess.Popen[bytes] | ForkedProcess

    def __init__(
        self,
        folder: Path,
        *,
        terminal: bool = False,
        real: bool = False,
        size: tuple[int, int] = (50, 120),
        words: Sequence[str] = (),
        **variables: str,
    ) -> None:
        self.folder = folder
        self.output = folder / "output"
        self.terminal = -1
        self.seen = b""
        environment = {**_ENVIRONMENT, "TMPDIR": str(folder), **variables}
        self._shell, self._inherited = forked.program(folder)  # which a fork names in what it suggests
        with ExitStack() as ends:
            if terminal:
                self.terminal, theirs = os.openpty()
                ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
                file: IO[bytes] = ends.enter_context(os.fdopen(theirs, "r+b", buffering=0))
                os.set_blocking(self.terminal, False)
            else:
                file = ends.enter_context(self.output.open("wb"))
            if real:
                self.process = subprocess.Popen(
                    tied([*_REAL, "demo", *words]),
                    env=environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            else:
                self.process = forked.start(
                    ["smtp-dup", "demo", *words],
                    env=environment,
                    cwd=folder,
                    stdin=file if terminal else None,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                    terminal=terminal,
                )

    @property
    def text(self) -> str:
        if self.terminal < 0:
            return self.output.read_text("utf-8")
        with suppress(OSError):  # nothing now, or the other end is closed
            while chunk := os.read(self.terminal, 65536):
                self.seen += chunk
        return self.seen.decode("utf-8", "replace")

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.text or self.process.poll() is not None, 60, lambda: self.text)
        assert words in self.text

    @property
    def left(self) -> list[int]:
        """Processes that belong to it."""
        return running_processes.of_session(self.process.pid)

    def paste(self, command: str, *, as_it_stands: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a shell, in another folder; unless ``as_it_stands`` smtp-dup is a fork there."""
        if not as_it_stands:
            command = command.replace(shlex.join(_REAL), shlex.quote(str(self.folder / "smtp-dup")))
        return subprocess.run(
            command,
            shell=True,
            cwd="/",
            env={**_ENVIRONMENT, **self._shell, **variables},
            pass_fds=[self._inherited],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def end(self) -> None:
        for pid in self.left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        if self.terminal >= 0:
            os.close(self.terminal)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary folder with a short path, so that it looks as it does for a user."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def demo(folder: Path) -> Iterator[Demo]:
    """A demo that has shown all."""
    instance = Demo(folder)
    try:
        instance.wait_for("Ctrl-C ends the demo.")
        yield instance
    finally:
        instance.end()


@pytest.fixture
def real_demo(folder: Path) -> Iterator[Demo]:
    """The same, started as a user does."""
    instance = Demo(folder, real=True)
    try:
        instance.wait_for("Ctrl-C ends the demo.")
        yield instance
    finally:
        instance.end()


def test_it_shows_what_happened_to_each(demo):
    """Each message with its outcome; a deferral and a refusal by each server are among them."""
    copies = dict(re.findall(r"^(.*): copy: (.*)$", demo.text, re.MULTILINE))
    assert {title: copies[title] for title in OUTCOMES} == OUTCOMES
    assert "Old refuses it: client heard: for zoe: 550 5.1.1" in demo.text
    assert "New defers it: new: 451 4.7.1 Greylisted / 250 2.0.0 Ok" in demo.text
    assert "New refuses it: client heard: 250 2.0.0" in demo.text
    assert "New refuses it: new: 550 5.1.1" in demo.text


def test_its_commands_can_be_pasted(real_demo):
    """Every command that it suggests works as it stands, in a shell and from another folder."""
    demo = real_demo
    commands = re.findall(r"^  ([^#\s].*)$", demo.text, re.MULTILINE)
    assert len(commands) == 13
    for command in commands:
        if command.startswith(("tail", "curl", "python3")):
            continue
        assert command.startswith(shlex.join(_REAL))
        says_no = {"ready": 1, "divergence": 1, "promote": 2}  # not ready; something is open; nobody to ask
        done = demo.paste(command, as_it_stands=" topology " in command)
        expected = next((status for word, status in says_no.items() if f" {word} " in command), 0)
        assert done.returncode == expected, (command, done.stderr)
        if expected == 1:
            assert "new" in done.stdout
    address, port = re.search(r"SMTP\('([\d.]+)', (\d+)\)", demo.text).groups()
    with smtplib.SMTP(address, int(port), timeout=20) as client:
        client.sendmail("me@example.org", ["frank@example.com"], "Subject: another\r\n\r\nHello\r\n")
    summary = next(command for command in commands if "queue summary" in command)

    def delivered() -> int:
        return int(json.loads(demo.paste(f"{summary} --json").stdout)["delivered"])

    wait_until(lambda: delivered() >= 5, message=lambda: demo.text)


def test_it_goes_on_sending_and_its_roles_can_be_swapped(demo, folder):
    """A message now and then, some of which the new server refuses; and it runs as any smtp-dup does, by its folder."""
    (state_dir,) = folder.glob("smtp-dup-demo-*")
    demo.wait_for("Your invoice: copy: failed list")
    done = demo.paste(f"smtp-dup promote new --force --reason demo --yes --state-dir {state_dir}")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "new answers since" in done.stdout
    done = demo.paste(f"smtp-dup undo --yes --state-dir {state_dir}")
    assert "old answers since" in done.stdout


def test_with_routes_a_domain_has_a_server_of_its_own(folder):
    """It says who answers, a message for both servers is split, and what it suggests shows and changes routes."""
    demo = Demo(folder, words=["--routes"])
    try:
        demo.wait_for("Ctrl-C ends the demo.")
        copies = dict(re.findall(r"^(.*): copy: (.*)$", demo.text, re.MULTILINE))
        assert {title: copies[title] for title in OUTCOMES} == OUTCOMES
        assert "For the shop: shop: 250 2.0.0 Ok" in demo.text
        assert "For both: client heard: for ben: 452 4.5.3" in demo.text
        assert "For both: old: 250 2.0.0 Ok" in demo.text
        suggested = dict(re.findall(r"^  # (.*)\n  (.*)$", demo.text, re.MULTILINE))
        said = {}
        for what, words in suggested.items():
            if re.search(" (route|move) ", words):
                done = demo.paste(words)
                assert done.returncode == 0, (words, done.stdout, done.stderr)
                said[what] = done.stdout
        assert len(said) == 4
        assert "shop.example" in said["Every route"]
        assert "shop" in said["Which one anna takes, and why"]
        assert "shop 75 %, new 25 %" in said["A quarter of the shop's mailboxes for the new server"]
    finally:
        demo.end()


def test_settings_for_another_redis_change_nothing(folder):
    """Where the machine's settings name a Redis, the demo leaves it alone, and so do the commands that it suggests."""
    other = {"SMTP_DUP_REDIS_URL": "redis://127.0.0.1:1/0"}
    demo = Demo(folder, **other)
    try:
        demo.wait_for("Ctrl-C ends the demo.")
        listing = next(line for line in demo.text.splitlines() if "failed list" in line and "state-dir" in line)
        done = demo.paste(f"{listing} --json", **other)
        assert json.loads(done.stdout.splitlines()[0])["recipients"] == ["erin@example.com"]
    finally:
        demo.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_leaves_nothing_behind(demo, folder, number):
    """After Ctrl-C or SIGTERM: status 0, no process, no folder."""
    assert list(folder.glob("smtp-dup-demo-*"))
    demo.process.send_signal(number)
    assert demo.process.wait(30) == 0
    assert demo.left == []
    assert not list(folder.glob("smtp-dup-demo-*"))
    assert "Stopped." in demo.text


@pytest.mark.parametrize("sign", ["settings.toml", "redis", "redis/redis.log", "redis/redis.sock", "seen.jsonl"])
def test_an_early_end_leaves_nothing_behind(folder, sign):
    """Told to stop while it still starts, or while it shows, it goes as completely."""
    demo = Demo(folder)
    try:
        wait_until(lambda: list(folder.glob(f"smtp-dup-demo-*/{sign}")), message=lambda: demo.text, interval=0.001)
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(30) == 0, demo.text
        wait_until(lambda: not demo.left, message=lambda: str(demo.left))  # Redis ends a moment after its parent
        assert not list(folder.glob("smtp-dup-demo-*"))
    finally:
        demo.end()


def test_on_a_terminal_it_is_a_table_and_ctrl_c_ends_it(folder):
    """The table is drawn in place, the cursor comes back, and the key itself ends everything."""
    demo = Demo(folder, terminal=True)
    try:
        demo.wait_for("Ctrl-C ends the demo.")
        assert "Client hears" in demo.text
        os.write(demo.terminal, b"\x03")
        wait_until(lambda: demo.text and demo.process.poll() is not None, 30, lambda: demo.text)
        assert demo.process.returncode == 0
        assert demo.left == []
        assert demo.text.rfind("\x1b[?25h") > demo.text.rfind("\x1b[?25l") >= 0
    finally:
        demo.end()


def screen(text: str, rows: int) -> list[str]:
    """Return what a terminal with so many rows shows of this output; nothing in it moves other than up and home."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r?\n|\r)", text):
        if part in {"\n", "\r\n"}:
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d*)A", part):
            row -= int(up[1] or 1)
            assert row >= max(0, len(lines) - rows), "it writes above the screen"
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines[-rows:]


def test_on_a_small_screen_the_table_stays_and_goes_on(folder):
    """At 80 columns and 24 rows the whole table is to be seen, and mail that arrives is added to it."""
    demo = Demo(folder, terminal=True, size=(24, 80))
    try:
        demo.wait_for("Ctrl-C ends the demo.")

        def shown(pattern: str) -> bool:
            return re.search(pattern, "\n".join(screen(demo.text, 24))) is not None

        wait_until(lambda: all(map(shown, ("Its copy", *OUTCOMES))), 60, lambda: demo.text)
        address, port = re.search(r"the relay is on\s+([\d.]+):(\d+)", demo.text).groups()
        with smtplib.SMTP(address, int(port), timeout=20) as client:
            for n in range(8):
                content = f"Subject: [bold]more {n}[/]\r\n\r\nHello\r\n"
                client.sendmail("me@example.org", ["frank@example.com"], content)
            with suppress(smtplib.SMTPRecipientsRefused):
                client.sendmail("me@example.org", ["gone@example.com"], "Subject: no\r\n\r\nHello\r\n")
        last = r"\[bold\]more 7\[/\].*250 2.0.0 Ok.*250 2.0.0 Ok.*250 2.0.0 Ok.*delivered"
        wait_until(lambda: shown(last) and shown("to gone@.*no copy") and shown("Its copy"), 60, lambda: demo.text)
    finally:
        demo.end()


def test_several_at_once(tmp_path):
    """Demos that start together do not get into each other's way, whoever is the first at the usual ports."""
    demos = []
    try:
        for n in range(3):
            (tmp_path / str(n)).mkdir()
            demos.append(Demo(tmp_path / str(n)))
        for demo in demos:
            demo.wait_for("Ctrl-C ends the demo.")
    finally:
        for demo in demos:
            demo.end()


@pytest.mark.parametrize(("colour", "is_coloured"), [("auto", False), ("always", True), ("never", False)])
def test_color_is_for_the_demo_too(colour, is_coloured, capsys):
    """The command line's --color comes as far as its table."""
    task = commands.parse(["demo", "--color", colour])
    assert task.arguments == {"colour": colour, "routes": False}
    coloured_console(colour).print("[green]250 taken[/]")
    assert ("\x1b[32m" in capsys.readouterr().out) == is_coloured
