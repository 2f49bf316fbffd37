"""Some of bench/disasters.py: storage and processes fail under mail, and the audit after it finds nothing."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.child_processes import tied

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["worker-stopped", "disk-fails"])
def test_disasters(name: str) -> None:
    """What got a 2xx is at each server as it was sent; every duplicate has its line."""
    command = [sys.executable, "-m", "bench.disasters", name]
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
