#!/usr/bin/env python3
"""The health check of the container: asks the status server, and says what it says.

    smtp-dup-health [/readyz | /healthz]

/readyz (the default) is healthy while mail can be taken and kept; `docker inspect` shows the reasons when it is not.
/healthz is healthy as long as the process lives: for whatever restarts unhealthy containers, since a restart helps
no Redis that is away. With status.listen = "off" there is nobody to ask, and the SMTP port must greet.

It runs every ten seconds, on a busy machine, too, so it is cheap: what runs here has left in the state folder where it
is to be asked. Only where that is not found it reads the settings' files and variables, which takes four times as long.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from typing import Any

_STATE_DIR = "/var/lib/smtp-dup"
_SECONDS = 9.0  # Docker waits for ten
_MOST = 1 << 20  # octets
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where such a listener is found)


def main() -> int:
    """Print one line; 0 is healthy, 1 is not."""
    path = sys.argv[1] if len(sys.argv) > 1 else "/readyz"
    try:
        healthy, line = ask(path)
    except ValueError as error:
        healthy, line = False, str(error)
    except OSError as error:
        healthy, line = False, f"nobody answers: {error}"
    sys.stdout.write(line + "\n")
    return 0 if healthy else 1


def ask(path: str) -> tuple[bool, str]:
    """Ask the status server, or the relay where there is none. Raises OSError, ValueError."""
    with suppress(ConnectionRefusedError):  # what a killed one has left
        if where := told():
            return ask_there(path, *where)
    return ask_there(path, *read())


def ask_there(path: str, status: Any, smtp: Any) -> tuple[bool, str]:
    """Ask at one of these addresses."""
    return answer(path, *status) if status else greeting(*smtp)


def told() -> tuple[Any, Any] | None:
    """Return where the status server and the relay of this host listen, as the running smtp-dup says; None if not."""
    folder = os.environ.get("SMTP_DUP_STATE_DIR") or _STATE_DIR
    found = []
    for role in ("up", "relay", "workers"):
        path = f"{folder}/running-{role}.json"
        with suppress(OSError, ValueError, KeyError, TypeError), open(path, "rb") as file:  # noqa: PTH123 - slow to load
            host, status, smtp = json.load(file)["asked"]
            if host == socket.gethostname():  # another container may share the folder
                found.append((os.fstat(file.fileno()).st_mtime, status, smtp))
    return max(found, key=lambda one: one[0])[1:] if found else None


def read() -> tuple[Any, Any]:
    """Return the same by the settings. Raises ValueError."""
    from relay.config.loader import SettingsError, load  # noqa: PLC0415  (a hundred modules)

    try:
        settings = load(require_primary=False)
    except SettingsError as error:
        raise ValueError(str(error.problems[0])) from error
    return settings.status.address, settings.smtp.addresses[0]


def answer(path: str, host: str, port: int) -> tuple[bool, str]:
    """Ask the status server. Raises OSError, ValueError."""
    received = b""
    with socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=_SECONDS) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        while len(received) < _MOST and (octets := client.recv(65536)):
            received += octets
    head, _, body = received.partition(b"\r\n\r\n")
    code = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") and b" " in head else 0
    if code == 200:
        return True, f"{path}: {code}"
    try:
        reasons = "; ".join(json.loads(body)["reasons"])
    except (ValueError, KeyError, TypeError):
        reasons = ""
    return False, f"{path}: {code or 'no answer'} {reasons}".rstrip()


def greeting(host: str, port: int) -> tuple[bool, str]:
    """Look for the relay's greeting. Raises OSError."""
    with socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=_SECONDS) as client:
        line = client.recv(512).decode("ascii", "replace").strip()
        client.sendall(b"QUIT\r\n")
    return line.startswith("220"), line


if __name__ == "__main__":
    sys.exit(main())
