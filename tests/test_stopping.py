"""A stop that comes by a signal, at any moment of what it interrupts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.waiting import PATIENCE

# In a process of its own: the handler of a signal is that of a main thread, and a hang must not be that of the test.
_AT_EVERY_LINE = """
import faulthandler, os, signal, sys
from relay.stopping import StopSignal
from workers.rqworker import shared_process

class Process:
    looks = 0
    def revive(self): pass
    def look(self):
        self.looks += 1

shared_process._LOOK_SECONDS = 0.001
faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
moment = came = 0
while came >= moment:  # until the loop has been seen from its begin to its third look
    moment += 1
    came = 0
    stop, process = StopSignal({signal.SIGTERM}), Process()
    def on_line(frame, event, argument):
        global came
        if process.looks > 2 and came < moment:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        came += 1
        if came == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return on_line
    sys.settrace(on_line)
    shared_process._keep_looking(process, stop)
    sys.settrace(None)
    assert stop.is_set
print(moment)
"""


def test_a_signal_at_every_line_of_a_wait() -> None:
    """A handler that needed a lock which the interrupted line holds would wait for itself."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _AT_EVERY_LINE, str(PATIENCE)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20
