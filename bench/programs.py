"""Our own small servers, each in a process of its own: started, waited for, stopped by its process id."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

from bench import ROOT
from support.child_processes import tied
from support.waiting import wait_until


def start(stack: ExitStack, module: str, *words: str, port: int, told: bool = False) -> subprocess.Popen[bytes]:
    """Run ``python -m bench.<module>`` until the end of the stack; returns when the port is listened on.

    One that is ``told`` things has a pipe as its standard input.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    process = subprocess.Popen(
        tied([sys.executable, "-m", f"bench.{module}", *words]),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE if told else subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is ours; we stop it
    )
    stack.callback(stop, process)
    wait_until(lambda: listens(process, port), message=f"bench.{module} does not listen on port {port}")
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; harmless when it has ended."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listens(process: subprocess.Popen[bytes], port: int) -> bool:
    """Say whether a port is listened on. Raises RuntimeError when the process that should has ended."""
    if process.poll() is not None:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
