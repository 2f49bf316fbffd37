"""A short run of bench/soak.py: everything killed and stalled at random, and nothing is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.child_processes import tied

ROOT = Path(__file__).parents[2]
SECONDS = 40


@pytest.mark.long
@pytest.mark.timeout(400)
def test_soak() -> None:
    """What got a 2xx is at each server as it was sent, or is listed; every duplicate has its line."""
    command = [sys.executable, "-m", "bench.soak", "--minutes", str(SECONDS / 60), "--seed", "7", "--sessions", "6"]
    # SIGTERM has it stop what it has started.
    process = subprocess.Popen(
        tied(command, signal.SIGTERM),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=380)
    finally:
        process.terminate()
        process.wait()
    assert process.returncode == 0, output[-6000:]
    assert "nothing lost or changed, every duplicate explained" in output
