"""swaks, the Swiss army knife of SMTP, as a client: a program of others with its own idea of every command."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

_FROM_TARGET = re.compile(r"(?m)^<(?:-|~|\*\*|~\*) +(.*)$")
_TO_TARGET = re.compile(r"(?m)^ [~-]> (.*)$")
_NEEDED = ("TLS", "IPv6", "AUTH CRAM-MD5")

FINE = 0
MAIL_REFUSED = 23
NO_RECIPIENT = 24
REFUSED_AT_END = 26
HELO_REFUSED = 22
AUTH_FAILED = 28
TLS_FAILED = 29
XCLIENT_FAILED = 33


def unavailable() -> str:
    """Say why swaks cannot be run here; "" when it can."""
    if shutil.which("swaks") is None:
        return "needs Debian's swaks package"
    supported = subprocess.run(["swaks", "--support"], capture_output=True, text=True, check=False).stdout
    lacking = [word for word in _NEEDED if f"=== {word} supported" not in supported]
    return f"needs swaks with {', '.join(lacking)}" if lacking else ""


@dataclass(frozen=True)
class Conversation:
    """What swaks said and heard, line by line, and its exit status."""

    status: int
    transcript: str

    @property
    def heard(self) -> list[str]:
        return [line.rstrip() for line in _FROM_TARGET.findall(self.transcript)]

    @property
    def message(self) -> bytes:
        """What it sent after DATA, without pipelining, before it doubled the dots."""
        said = [line.removesuffix("\r") for line in _TO_TARGET.findall(self.transcript)]
        lines = said[said.index("DATA") + 1 : -2]  # then the dot and QUIT
        return "".join(f"{line.removeprefix('.')}\r\n" for line in lines).encode("utf-8", "surrogateescape")


def swaks(server: str, *options: str, data: str = "", timeout: float = 60) -> Conversation:
    """Run it against a server (``127.0.0.1:2525``); ``data`` is its standard input."""
    done = subprocess.run(
        ["swaks", "--server", server, "--timeout", "20", *options],
        input=data.encode(),
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    return Conversation(done.returncode, (done.stdout + done.stderr).decode("utf-8", "surrogateescape"))
