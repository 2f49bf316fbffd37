"""Whatever becomes of standard error, mail goes on: lines are dropped and counted, and nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay import log_output
from relay.log_output import LogStream
from support.child_processes import tied
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
LINE = "x" * 199 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for descriptor in ends:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def read_all(descriptor: int, seconds: float = 0.3) -> bytes:
    """Return what comes until nothing comes for a while."""
    found = b""
    while select.select([descriptor], [], [], seconds)[0] and (data := os.read(descriptor, 65536)):
        found += data
    return found


def write_much(output: LogStream, count: int = 10_000) -> float:
    begun = time.monotonic()
    for _ in range(count):
        output.write(LINE)
    return time.monotonic() - begun


@pytest.mark.parametrize("threads", [True, False])
@pytest.mark.parametrize("again", [True, False], ids=["opened anew", "as given"])
def test_a_pipe_that_nobody_reads(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch, threads: bool, again: bool
) -> None:
    """Lines are kept up to a bound, then dropped; once somebody reads, all that was kept comes, and a number."""
    if not again:
        monkeypatch.setattr(log_output, "_never_blocking", lambda descriptor: (None, descriptor))
    output = LogStream(pipe[1], threads=threads)
    assert write_much(output) < 10
    assert os.get_blocking(pipe[1])  # it is others' as well
    assert output.dropped > 1000
    dropped = output.dropped
    text = b""
    while b"dropped" not in text:
        text += read_all(pipe[0], 0.001)
        output.flush()
    assert text.count(LINE.encode()) + dropped == 10_000
    assert f"\n{dropped} log lines were dropped\n".encode() in text
    output.write("last\n")
    output.flush(5)
    assert read_all(pipe[0]).endswith(b"last\n")
    os.close(pipe[0])
    assert write_much(output, 100) < 5
    wait_until(lambda: not output._kept)


def test_a_slow_reader_gets_all(pipe: tuple[int, int]) -> None:
    """What fits into the bound is only late, and in its order."""
    output = LogStream(pipe[1])
    lines = [f"{n:099}\n" for n in range(2000)]
    reading = threading.Thread(target=lambda: found.append(read_all(pipe[0], 2)))
    found: list[bytes] = []
    reading.start()
    for line in lines:
        output.write(line)
    reading.join()
    assert found[0].decode() == "".join(lines)
    assert not output.dropped


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an output is for life
def test_a_socket_and_a_terminal_that_nobody_reads() -> None:
    """journald's socket, and a terminal that is paused."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert write_much(LogStream(ours.fileno())) < 10
        assert ours.getblocking()
    master, terminal = pty.openpty()
    termios.tcflow(terminal, termios.TCOOFF)
    output = LogStream(terminal)
    assert write_much(output) < 10
    termios.tcflow(terminal, termios.TCOON)
    assert b"x" * 80 in read_all(master)
    os.close(master)
    os.close(terminal)


@pytest.mark.parametrize("path", ["/dev/full", ""])
def test_an_output_that_refuses(path: str) -> None:
    """A full disk, or a descriptor that was closed: dropped, counted, no exception."""
    descriptor = os.open(path or "/dev/null", os.O_WRONLY)
    output = LogStream(descriptor)
    if not path:
        os.close(descriptor)
        output = LogStream(descriptor)
    output.write(LINE)
    output.flush(1)
    wait_until(lambda: output.dropped == 1)
    if path:
        os.close(descriptor)


def test_a_forked_process_repeats_nothing(pipe: tuple[int, int]) -> None:
    """What the parent could not write is the parent's."""
    output = LogStream(pipe[1])
    write_much(output, 100)
    assert output.waits
    output.restart()
    assert not output.waits


# The product


def test_lines_of_one_turn_leave_together(pipe: tuple[int, int]) -> None:
    """A loop's lines are written at the end of its turn, whole lines in a write, in order with those of warnings."""
    output, turn = LogStream(pipe[1]), list[Callable[[], None]]()
    writes: list[bytes] = []
    output._send = lambda data: writes.append(data) or len(data)
    output.gather(lambda write, text: turn.append(lambda: write(text)))
    for number in range(30):
        output.write_soon(f"{number:199}\n")
    assert (writes, len(turn)) == ([], 1)
    turn.pop()()
    assert [len(data) for data in writes] == [4000, 2000]
    output.write_soon("accepted\n")
    output.write("warning\n")
    assert writes[2:] == [b"accepted\nwarning\n"]
    turn.pop()()  # nothing is left for it
    other = threading.Thread(target=output.write_soon, args=("of another thread\n",))
    other.start()
    other.join()
    assert writes[3:] == [b"of another thread\n"]


@pytest.mark.parametrize("end", ["gather", "flush", "loop"])
def test_an_orderly_end_loses_no_line(pipe: tuple[int, int], end: str) -> None:
    """Lines of the last turn are written whichever way its process ends: drained, at exit, or its loop closed."""
    output = LogStream(pipe[1])
    loop = asyncio.new_event_loop()
    output.gather(loop.call_soon)
    if end == "loop":
        loop.close()
        output.write_soon("last\n")
    else:
        output.write_soon("last\n")
        loop.close()
        output.gather(None) if end == "gather" else output.flush()
    output.gather(None)
    output.write_soon("later\n")
    assert read_all(pipe[0]) == b"last\nlater\n"


@pytest.mark.long
@pytest.mark.parametrize("closed", [False, True], ids=["nobody reads", "broken pipe"])
def test_mail_goes_on_while_nobody_reads_the_log(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, pipe: tuple[int, int], closed: bool
) -> None:
    """Hundreds of messages through relay and worker; then the missing lines are counted, and SIGTERM ends it all."""
    house = product(primary=primary.address, backups=[backup.address], start=False)
    house.process = subprocess.Popen(
        tied(house._argv("up")),
        cwd=house.directory,
        env=house.environment,
        stdin=subprocess.DEVNULL,
        stdout=pipe[1],
        stderr=pipe[1],
        start_new_session=True,
    )
    if closed:
        os.close(pipe[0])
    house.wait_ready()
    for _ in range(2):
        with house.dialogue(timeout=10) as client:
            client.hello()
            for _ in range(1000):
                client.mail("a@example.com", "b@example.com", data=b"x\r\n")
    backup.wait_for(2000)
    assert len(primary.messages) == 2000
    wait_until(lambda: house.metric("smtpdup_log_lines_dropped_total") > 100)
    if not closed:
        text = b""
        end = time.monotonic() + 30
        while b"log lines were dropped" not in text and time.monotonic() < end:
            text += read_all(pipe[0], 0.5)
        assert b"log lines were dropped" in text
    assert house.stop() == 0


def test_standard_error_that_is_closed(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Started with `2>&-`: mail goes on, and no other file gets the log."""
    house = product(primary=primary.address, backups=[backup.address], start=False)
    house.process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *house._argv("up")],
        cwd=house.directory,
        env=house.environment,
        start_new_session=True,
    )
    house.wait_ready()
    assert house.send("a@example.com", "b@example.com").startswith("250")
    backup.wait_for(1)
    for child in [house.process.pid, *(c.pid for c in house.children("relay.command"))]:
        assert Path(f"/proc/{child}/fd/2").readlink() == Path("/dev/null")
    house.process.send_signal(signal.SIGTERM)
    assert house.wait() == 0


def test_signals_that_were_ignored_or_blocked_by_who_started_us(
    product: Make, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Under nohup, in the background of a script, or below a parent that blocks them: reload and stop work."""
    house = product(primary=primary.address, backups=[backup.address], start=False)
    launcher = (
        "import os, signal, sys\n"
        "numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}\n"
        "for number in numbers:\n"
        "    signal.signal(number, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, numbers)\n"
        "os.execvp(sys.argv[1], sys.argv[1:])\n"
    )
    argv = house._argv
    house._argv = lambda *words: [sys.executable, "-c", launcher, *argv(*words)]
    house.start()
    house._argv = argv
    assert house.process is not None
    house.process.send_signal(signal.SIGHUP)
    house.wait_for_log("certificate and users reloaded")
    dead = house.child("relay-1")
    dead.kill()
    wait_until(lambda: house.child("relay-1").pid != dead.pid)
    assert house.stop() == 0
