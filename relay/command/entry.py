"""The console script: a start that has just begun hears its signals; main.py takes longer to load."""

from __future__ import annotations

import sys
from typing import NoReturn

from relay import early_signals

_STARTS = ("up", "relay", "workers", "demo")


def main() -> NoReturn:
    """Run the command line of this process, and exit with its status."""
    if sys.argv[1:2] and sys.argv[1] in _STARTS:
        early_signals.catch()
    try:
        from relay.command import main as command  # noqa: PLC0415  (a signal may come while this is loaded)
    except KeyboardInterrupt:
        from relay.command import exit_status  # noqa: PLC0415  (for the same reason)

        sys.exit(exit_status.INTERRUPTED)
    command.main()
