"""A process that has stopped itself at a fault point (relay.faultpoints), and what is killed then."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from support.product import Product
from support.waiting import wait_until

VICTIMS = ("itself", "supervisor", "redis")


def kill(product: Product, victim: str) -> None:
    """Kill the stopped process, or its neighbour; whoever lives on is let go."""
    (stopped,) = wait_until(lambda: [child.pid for child in product.children() if _state(child.pid) == "T"])
    if victim == "itself":
        os.kill(stopped, signal.SIGKILL)
    elif victim == "supervisor":
        product.kill()
    else:
        (server,) = product.children("valkey-server|redis-server")
        server.kill()
        os.kill(stopped, signal.SIGCONT)


def _state(pid: int) -> str:
    """Return a process's state letter."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
