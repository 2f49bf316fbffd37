"""Starts the product for tests in forks of one process that has imported it already: see ``support.prepared_process``.

Its imports take more than a second of processor time, and the tests start it some thousand times. What cannot be had in
a fork, another environment of the interpreter or of the loader (``LD_PRELOAD``), is for ``subprocess``: ask ``fits``.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import IO

from support.prepared_process import OCTETS

_server: tuple[socket.socket, subprocess.Popen[bytes]] | None = None
# What the interpreter and its libraries read once, when they start.
_READ_AT_START = ("LD_", "PYTHON", "MALLOC_", "GLIBC_", "LC_", "LANG", "LOGURU_", "SSL_", "OPENSSL_")
_OURS = {"PYTHONPATH", "PYTHONUNBUFFERED"}
_AT_START = {name: value for name, value in os.environ.items() if name.startswith(_READ_AT_START)}  # of all forks
_VARIABLE = "SMTPDUP_TEST_FORKS"


def fits(env: Mapping[str, str]) -> bool:
    """Return whether a fork can have this environment."""
    if sys.platform != "linux":
        return False
    names = {name for name in {*env, *_AT_START} if name.startswith(_READ_AT_START)} - _OURS
    return all(env.get(name) == _AT_START.get(name) for name in names)


class ForkedProcess:
    """A process that was started; its methods and attributes are those of ``subprocess.Popen``."""

    def __init__(self, answer: socket.socket) -> None:
        self._answer = answer
        self.returncode: int | None = None
        try:
            self.pid = self._told(None)
        except BaseException:  # the test's time is over
            answer.close()
            raise

    def poll(self) -> int | None:
        return self._end(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        status = self._end(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it, unless it has ended, and wait for that."""
        self.kill()
        self.wait()

    def _end(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = self._told(timeout)
            except (TimeoutError, BlockingIOError):
                return None
            self._answer.close()
        return self.returncode

    def _told(self, timeout: float | None) -> int:
        self._answer.settimeout(timeout)
        told = self._answer.recv(100)
        if not told:
            raise AssertionError("the process that starts the product has ended")
        return int(told)


def start(
    program: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes],
    stderr: IO[bytes],
    start_new_session: bool = False,
    terminal: bool = False,
    listening: Sequence[int] = (),
) -> ForkedProcess:
    """Start ``smtp-dup`` with arguments, or a program in Python given by its path, as ``subprocess.Popen`` does.

    It gets /dev/null for a ``stdin`` of None, and ends with the test run. With ``terminal`` it leads a session whose
    terminal ``stdin`` is: the keys there mean something. It gets the ``listening`` descriptors as systemd passes them.
    """
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "program": [*program],
        "cwd": str(cwd),
        "env": dict(env),
        "session": start_new_session,
        "terminal": terminal,
        "listens": bool(listening),
        "umask": umask,
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, Path(os.devnull).open("rb") as nothing:
        files = [(stdin or nothing).fileno(), stdout.fileno(), stderr.fileno(), *listening, theirs.fileno()]
        socket.send_fds(_connected(), [dumps(request).encode()], files)
    return ForkedProcess(ours)


def run(
    words: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    input: str,  # noqa: A002 - as of subprocess.run
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    """Run ``smtp-dup`` with arguments as ``subprocess.run`` does with text. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input.encode())
        given.seek(0)
        process = start(["smtp-dup", *words], cwd=cwd, env=env, stdin=given, stdout=out, stderr=err)
        try:
            status = process.wait(timeout)
        finally:
            process.end()
        texts = []
        for file in (out, err):
            file.seek(0)
            # Line ends as subprocess.run reads them.
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
        return subprocess.CompletedProcess(["smtp-dup", *words], status, *texts)


_PROGRAM = """#!{python} -IS
import _socket, json, os, signal, sys

umask = os.umask(0)
os.umask(umask)
words = {{"program": ["smtp-dup", *sys.argv[1:]], "cwd": os.getcwd(), "env": dict(os.environ)}}
ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
files = b"".join(file.to_bytes(4, sys.byteorder) for file in (0, 1, 2, theirs.fileno()))
signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
request = {{**words, "umask": umask, "session": False, "terminal": False, "listens": False}}
_socket.socket(fileno=int(os.environ["{variable}"])).sendmsg(
    [json.dumps(request).encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, files)]
)
theirs.close()
pid = int(ours.recv(100))
for number in signals:
    signal.signal(number, lambda number, _: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
status = int(ours.recv(100))
sys.exit(status if status >= 0 else 128 - status)
"""


def program(folder: Path) -> tuple[dict[str, str], int]:
    """Write a ``smtp-dup`` into a folder, for a shell: it starts a fork, and is there until that ends.

    Returns the variables that it needs, and a descriptor that it inherits.
    """
    path = folder / "smtp-dup"
    path.write_text(_PROGRAM.format(python=sys.executable, variable=_VARIABLE))
    path.chmod(0o755)
    descriptor = _connected().fileno()
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", _VARIABLE: str(descriptor)}, descriptor


def _connected() -> socket.socket:
    global _server  # noqa: PLW0603 - one for a test process
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, OCTETS)
        folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        with theirs:
            # Whatever the test has set that happens to be the first one to need it.
            env = {name: value for name, value in os.environ.items() if not name.startswith(_READ_AT_START)} | _AT_START
            process = subprocess.Popen(
                [sys.executable, "-m", "support.prepared_process", str(theirs.fileno())],
                env={**env, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        atexit.register(_end, ours, process)
        _server = ours, process
    return _server[0]


def _end(ours: socket.socket, process: subprocess.Popen[bytes]) -> None:
    ours.close()
    process.wait()
