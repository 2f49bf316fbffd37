"""Postfix's smtp-source as the load: started, timed to the moment of its end, and killed when it takes too long."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from support import load


@dataclass(frozen=True, slots=True)
class Load:
    """What to send: so many messages from a file, over so many connections, each kept open or new for each message."""

    count: int
    message: Path
    sessions: int = 20
    kept: bool = True
    sender: str = "a@example.com"
    recipient: str = "b@example.com"

    def of(self, count: int) -> Load:
        return Load(count, self.message, self.sessions, self.kept, self.sender, self.recipient)


class Source:
    """A running smtp-source. ``begun`` and ``ended`` are monotonic; it ends when its last message is accepted."""

    def __init__(self, port: int, what: Load) -> None:
        found = load.program("smtp-source")
        if found is None:
            raise FileNotFoundError(load.unavailable())
        # Each session waits for one answer at a time; -C: a full listen queue is no error of the server's.
        command = [found, "-C", "5", "-s", str(what.sessions), "-m", str(what.count), "-F", str(what.message)]
        command += ["-f", what.sender, "-t", what.recipient, *(["-d"] if what.kept else []), f"127.0.0.1:{port}"]
        self.begun = time.monotonic()
        self.ended: float | None = None
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._output = ""
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        self._output = self._process.communicate()[0]
        self.ended = time.monotonic()

    def kill(self) -> None:
        """End it; harmless when it has ended."""
        self._process.kill()
        self._waiter.join()

    @property
    def trouble(self) -> str:
        """What it complained about, "" when every message was accepted. Only to be asked after its end."""
        return "" if self._process.returncode == 0 else f"smtp-source: {self._output.strip()[-300:]}"
