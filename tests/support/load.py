"""Postfix's own test programs: ``smtp-sink`` swallows mail fast or keeps it in files, ``smtp-source`` sends it."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from support.child_processes import Daemon
from support.dialogue import Dialogue, Unexpected
from support.waiting import PATIENCE, free_port, wait_until


def unavailable() -> str:
    """Say why the programs cannot be run; "" when they can."""
    return "" if program("smtp-sink") and program("smtp-source") else "needs Debian's postfix package (smtp-sink)"


def program(name: str) -> str | None:
    """Find a program that may be outside of an ordinary user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class SmtpSink:
    """A sink on a loopback port. ``keep=True`` writes every message to a file; else they are only counted.

    ``options`` are the program's: ``("-r", "RCPT")`` answers 4xx to RCPT, ``("-W", ".:2")`` is slow at the dot.
    """

    def __init__(self, *options: str, keep: bool = False, port: int = 0) -> None:
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="smtp-dup-sink-"))
        self.keep = keep
        self._options = options
        self._counters = self.directory / "counters"
        self._daemon: Daemon | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self) -> Self:
        found = program("smtp-sink")
        assert found, unavailable()
        command = [found, "-c", *self._options]
        if self.keep:
            (self.directory / "mail").mkdir(exist_ok=True)
            command += ["-d", "mail/"]
        if os.geteuid() == 0:  # it refuses to run as root
            command += ["-u", "nobody"]
            self.directory.chmod(0o755)
            if self.keep:
                nobody = pwd.getpwnam("nobody")
                os.chown(self.directory / "mail", nobody.pw_uid, nobody.pw_gid)
        with self._counters.open("ab") as counters:
            process = subprocess.Popen(
                [*command, self.address, "1000"],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=counters,
                stderr=counters,
                process_group=0,
            )
        self._daemon = Daemon(process, self.directory)
        wait_until(self._answers, message=lambda: f"smtp-sink does not answer: {self._counters.read_text()}")
        return self

    def stop(self) -> None:
        if self._daemon is not None:
            self._daemon.stop(signal.SIGKILL)  # also when it is paused
            self._daemon = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def pause(self) -> None:
        """Let it hang."""
        assert self._daemon is not None
        self._daemon.pause()

    def resume(self) -> None:
        assert self._daemon is not None
        self._daemon.resume()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def count(self) -> int:
        """The number of messages taken since ``start``."""
        if self.keep:
            return sum(1 for _ in (self.directory / "mail").iterdir())
        with self._counters.open("rb") as counters:
            counters.seek(max(0, self._counters.stat().st_size - 200))
            found = re.findall(rb"mesg=(\d+)", counters.read())
        return int(found[-1]) if found else 0

    def wait_for(self, count: int, timeout: float = 60) -> None:
        wait_until(lambda: self.count >= count, timeout, lambda: f"{self.count} of {count} messages came")

    def messages(self) -> list[bytes]:
        """Return the kept messages: the sink's own headers (X-Rcpt-Args...) first, LF line ends."""
        return [path.read_bytes() for path in sorted((self.directory / "mail").iterdir())]

    def _answers(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.runs, f"smtp-sink ended: {self._counters.read_text()}"
        try:
            with Dialogue(self.port, greeting=None):
                return True
        except (OSError, Unexpected):
            return False


def smtp_source(
    port: int,
    *,
    count: int,
    sessions: int = 1,
    size: int = 4096,
    keep_connections: bool = True,
    sender: str = "a@example.com",
    recipient: str = "b@example.com",
    timeout: float = 120,
) -> None:
    """Send ``count`` messages of ``size`` octets over ``sessions`` connections at once; fails when one is refused."""
    found = program("smtp-source")
    assert found, unavailable()
    command = [found, "-s", str(sessions), "-l", str(size), "-m", str(count), "-f", sender, "-t", recipient]
    # -d: do not disconnect after each message.
    command += [*(["-d"] if keep_connections else []), f"127.0.0.1:{port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(timeout, PATIENCE), check=False)
    assert done.returncode == 0, f"smtp-source: {done.stdout}{done.stderr}"
