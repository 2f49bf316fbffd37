"""The end of what tests start: nothing of it is left for the test that comes next."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from support import ended_loops
from support.running_processes import is_running
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Scripted = Callable[..., ScriptedServer]
# Its first thread ends, another goes on listening.
FIRST_THREAD_ENDS = """
import ctypes, socket, threading
listening = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=listening.accept).start()
print(listening.getsockname()[1], flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_server_that_stops_leaves_no_connection():
    """Those that it is just accepting are closed, too: what collects them would fail whatever test runs then."""
    for _ in range(20):
        server = ScriptedServer().start()
        with ExitStack() as clients:
            for _ in range(3):
                clients.enter_context(socket.create_connection((server.host, server.port)))
            server.stop()
    gc.collect()


async def test_what_a_loop_leaves_open_is_told(scripted: Scripted):
    """It is named once, for the test that has closed the loop."""
    address = scripted()
    loop = asyncio.new_event_loop()

    def leave() -> None:
        transport, _ = loop.run_until_complete(loop.create_connection(asyncio.Protocol, address.host, address.port))
        loop.close()
        with warnings.catch_warnings(action="ignore"):
            del transport
            gc.collect()

    await asyncio.to_thread(leave)
    (left,) = ended_loops.left_open()
    assert "_SelectorSocketTransport" in left
    assert not ended_loops.left_open()


def test_a_process_runs_while_one_of_its_threads_does():
    """What it listens on is in use until then, although /proc shows its first thread as a zombie."""
    with subprocess.Popen([sys.executable, "-c", FIRST_THREAD_ENDS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        port = int(process.stdout.readline())
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: ") Z " in stat.read_text())
        assert is_running(process.pid)
        socket.create_connection(("127.0.0.1", port)).close()
        wait_until(lambda: not is_running(process.pid))
        assert ") Z " in stat.read_text()  # nobody has reaped it
