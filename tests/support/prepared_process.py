"""A process that has imported the product already, and forks for everything that tests start of it.

``python -m support.prepared_process FD`` serves the socket with that number until its other end is closed; the requests
are those of ``support.forked``. A fork is what a process of its own would be that Python has just started: its folder,
arguments, environment, standard streams, umask, session, signals, its state of loguru and of random. It ends as
any program does. Forks whose caller has hung up, or is dead, are killed.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from support import remembered

OCTETS = 1 << 20  # of a request: arguments and environment
WAITS = "SMTPDUP_TEST_WAITS"  # module.NAME=seconds ...: how long the product waits, where no setting says it
_PR_SET_PDEATHSIG = 1


class Begun(NamedTuple):
    """What a fork is to be, as it is asked for."""

    request: dict[str, Any]
    files: list[int]


class _Fork:
    def __init__(self, pid: int, answer: socket.socket) -> None:
        self.pid = pid
        self.answer = answer
        self.ended = os.pidfd_open(pid)

    def close(self) -> None:
        self.answer.close()
        os.close(self.ended)


class PreparedProcess:
    """The server: one thread, one loop."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._pid = os.getpid()
        self._forks: list[_Fork] = []

    def serve(self) -> Begun | None:
        """Serve until the other end is closed. Returns in each fork, too: there with what it is to be."""
        while True:
            poll = select.poll()
            poll.register(self._requests, select.POLLIN)
            for fork in self._forks:
                poll.register(fork.ended, select.POLLIN)
                poll.register(fork.answer, select.POLLRDHUP)
            ready = {descriptor for descriptor, _ in poll.poll()}
            for fork in [*self._forks]:
                if fork.ended in ready:
                    self._tell(fork)
                elif fork.answer.fileno() in ready:
                    os.kill(fork.pid, signal.SIGKILL)
            if self._requests.fileno() in ready:
                data, files, *_ = socket.recv_fds(self._requests, OCTETS, 16)
                if not data:
                    return None
                if begun := self._begin(json.loads(data), files):
                    return begun

    def _begin(self, request: dict[str, Any], files: list[int]) -> Begun | None:
        answer = socket.socket(fileno=files.pop())
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            if os.getppid() != self._pid:
                os._exit(1)
            answer.close()
            self._requests.close()
            for fork in self._forks:
                fork.close()
            return Begun(request, files)
        for file in files:
            os.close(file)
        self._forks.append(_Fork(pid, answer))
        self._send(self._forks[-1], pid)
        return None

    def _tell(self, fork: _Fork) -> None:
        _, status = os.waitpid(fork.pid, 0)
        self._forks.remove(fork)
        self._send(fork, os.waitstatus_to_exitcode(status))
        fork.close()

    @staticmethod
    def _send(fork: _Fork, number: int) -> None:
        with suppress(OSError):  # hung up
            fork.answer.send(str(number).encode())


def be(begun: Begun) -> NoReturn:
    """Be what was asked for, to its end."""
    status = 0
    try:
        _run(begun)
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:  # as the interpreter does
        status = 1
        sys.excepthook(*sys.exc_info())
    # The end of the interpreter, but that it leaves alone what is in memory: to take all of that apart is to copy it.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    os._exit(status & 0xFF)


def _run(begun: Begun) -> None:
    request, files = begun
    if request["terminal"]:
        os.login_tty(os.dup(files[0]))
    elif request["session"]:
        os.setsid()
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in files]
    for file in files:
        os.close(file)
    for number, file in enumerate(aside):
        os.dup2(file, number)
        os.close(file)
    _reopen_streams()
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["listens"]:
        os.environ.update(LISTEN_FDS=str(len(files) - 3), LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="smtp-dup.socket")
    time.tzset()
    random.seed()
    _renew()
    program: Sequence[str] = request["program"]
    sys.argv = [*program]
    if program[0] == "smtp-dup":
        from relay.command.main import main

        main()
    else:
        runpy.run_path(program[0], run_name="__main__")


def _reopen_streams() -> None:
    """Have the streams of what the descriptors are now: a file can be sought in, a pipe cannot."""
    sys.stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)  # noqa: SIM115 - for the process's life
    for number, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115 - for the process's life
        text = io.TextIOWrapper(raw, before.encoding, before.errors, newline="\n", write_through=True)
        setattr(sys, name, text)


def _renew() -> None:
    """Have the modules as they are after their import in this environment, as far as that makes a difference."""
    from loguru import logger

    from relay import faultpoints

    logger.remove()
    logger.add(sys.stderr)
    importlib.reload(faultpoints)
    for wait in os.environ.get(WAITS, "").split():
        place, _, seconds = wait.partition("=")
        module, _, name = place.rpartition(".")
        getattr(sys.modules[module], name)  # it is there, or the test hears of it
        setattr(sys.modules[module], name, float(seconds))


def prepare() -> None:
    """Import the product, whole."""
    for name in ("relay", "workers"):
        for module in pkgutil.walk_packages(importlib.import_module(name).__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    remembered.remember()
    gc.collect()
    gc.freeze()  # a collection in a fork does not copy all of it


if __name__ == "__main__":
    prepare()
    if begun := PreparedProcess(socket.socket(fileno=int(sys.argv[1]))).serve():
        be(begun)
