#!/usr/bin/env python3
"""The health check of the container: asks the status server, and says what it says.

    smtp-dup-health [/readyz | /healthz]

/readyz (the default) is healthy while mail can be taken and kept; `docker inspect` shows the reasons when it is not.
/healthz is healthy as long as the process lives: for whatever restarts unhealthy containers, since a restart helps
no Redis that is away. With status.listen = "off" there is nobody to ask, and the SMTP port must greet. It reads the
settings' files and variables, not the flags of the running command.
"""

from __future__ import annotations

import json
import socket
import sys
import urllib.error
import urllib.request

from relay.config.loader import SettingsError, load

_SECONDS = 8.0
_EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (where such a listener is found)


def main() -> int:
    """Print one line; 0 is healthy, 1 is not."""
    try:
        settings = load(require_primary=False)
        if settings.status.address is None:
            healthy, line = greeting(*settings.smtp.addresses[0])
        else:
            healthy, line = answer(*settings.status.address, sys.argv[1] if len(sys.argv) > 1 else "/readyz")
    except SettingsError as error:
        healthy, line = False, str(error.problems[0])
    except OSError as error:
        healthy, line = False, f"nobody answers: {error}"
    sys.stdout.write(line + "\n")
    return 0 if healthy else 1


def answer(host: str, port: int, path: str) -> tuple[bool, str]:
    """Ask the status server. Raises OSError."""
    host = _EVERYWHERE.get(host, host)
    url = f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:  # noqa: S310  (http, to ourselves)
            return True, f"{path}: {response.status}"
    except urllib.error.HTTPError as error:
        body = error.read(4096)
        try:
            reasons = "; ".join(json.loads(body)["reasons"])
        except (ValueError, KeyError, TypeError):
            reasons = ""
        return False, f"{path}: {error.code} {reasons}".rstrip()


def greeting(host: str, port: int) -> tuple[bool, str]:
    """Look for the relay's greeting. Raises OSError."""
    with socket.create_connection((_EVERYWHERE.get(host, host), port), timeout=_SECONDS) as client:
        line = client.recv(512).decode("ascii", "replace").strip()
        client.sendall(b"QUIT\r\n")
    return line.startswith("220"), line


if __name__ == "__main__":
    sys.exit(main())
