"""Runs `smtp-dup` commands for tests in forks of one process that has imported the product already.

The imports of a command take a third of a second of processor time, and a test that waits for something in the ledger
runs dozens. Each command still has a process, a folder, an environment and standard streams of its own. As a program
(``python -m support.command_server FD``) this is that process: it ends when the test run's end of FD is closed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_OCTETS = 1 << 20  # of a request: arguments and environment
_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


def run(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    input: str,  # noqa: A002
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run a command as ``subprocess.run`` does with text. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input.encode())
        given.seek(0)
        ours, theirs = socket.socketpair()
        request = json.dumps({"words": list(words), "cwd": str(cwd), "env": dict(env)}).encode()
        with ours:
            with theirs:
                files = [given.fileno(), out.fileno(), err.fileno(), theirs.fileno()]
                socket.send_fds(_connected(), [request], files)
            ours.settimeout(timeout)
            try:
                status = ours.recv(100)
            except TimeoutError:
                raise subprocess.TimeoutExpired(list(words), timeout) from None
        if not status:
            raise AssertionError(f"smtp-dup {' '.join(words)} was not run")
        texts = []
        for file in (out, err):
            file.seek(0)
            # Line ends as subprocess.run reads them.
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
        return subprocess.CompletedProcess(["smtp-dup", *words], int(status), *texts)


def _connected() -> socket.socket:
    global _server  # noqa: PLW0603 - one for a test process
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _OCTETS)
        folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "support.command_server", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        _server = ours, process
        atexit.register(_end, ours, process)
    return _server[0]


def _end(ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
    ours.close()
    process.wait()


# The process -----------------------------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for a command
    while True:
        data, files, *_ = socket.recv_fds(requests, _OCTETS, 4)
        if not data:
            return
        if os.fork() == 0:
            requests.close()
            _see_through(json.loads(data), files)
        for file in files:
            os.close(file)


def _see_through(request: Mapping[str, object], files: Sequence[int]) -> NoReturn:
    """Run one command in a fork, and say how it ended; who hung up waits no longer, and the command ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answer = socket.socket(fileno=files[3])
    command = os.fork()
    if command == 0:
        answer.close()
        _be(request, files)
    for file in files[:3]:
        os.close(file)
    ended = os.pidfd_open(command)
    import select

    readable, _, _ = select.select([ended, answer], [], [])
    if ended not in readable:
        os.kill(command, signal.SIGKILL)
    _, status = os.waitpid(command, 0)
    try:
        answer.send(str(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def _be(request: Mapping[str, object], files: Sequence[int]) -> NoReturn:
    for number in range(3):
        os.dup2(files[number], number)
    for file in files[:3]:
        os.close(file)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    sys.argv = ["smtp-dup", *request["words"]]  # type: ignore[misc]
    status = 1
    try:
        from relay.command.main import main

        main()
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # as the interpreter does
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                status = status or 120
        os._exit(status)


def _prepare() -> None:
    import importlib
    import pkgutil

    import relay.command

    for module in pkgutil.iter_modules(relay.command.__path__, "relay.command."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


if __name__ == "__main__":
    _prepare()
    _serve(socket.socket(fileno=int(sys.argv[1])))
