"""Log output to standard error that never blocks: lines that cannot be written are buffered, then dropped and counted.

A line is written at once if that cannot block: a pipe or a terminal is opened again, since O_NONBLOCK on the inherited
descriptor would apply to all processes that share it; a socket (journald's) has a flag for each write; a file accepts
lines or refuses them. Other lines are buffered, up to a limit, and a thread writes them when possible. If a descriptor
cannot be opened again, the thread writes all lines. The supervisor forks and so has no thread: it tries again whenever
it wakes up. Once lines can be written again, a line gives the number of dropped ones. Nothing here raises.

Lines of ordinary mail that an event loop logs (``write_soon``) are gathered and written once a turn of it, as one write
costs as much as making ten lines. A crash loses those of its last turn, an orderly end none.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import select
import signal
import socket
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

_KEPT_OCTETS = 256 << 10
_PIECE = 4096  # PIPE_BUF: a write up to this size is atomic, so that lines of several processes do not mix
_LOOK_SECONDS = 1.0
_LAST_SECONDS = 1.0  # for the buffered lines when a process ends

on_drop: Callable[[int], None] | None = None  # set by metrics.py


class LogStream:
    """A descriptor that log lines are written to. ``threads``: whether a thread may block on it."""

    def __init__(self, descriptor: int = 2, *, threads: bool = True) -> None:
        self.threads = threads
        self.tell: Callable[[int], str] = "{} log lines were dropped\n".format
        self.dropped = 0  # and not yet reported
        self._refused = False  # the last write failed
        self._descriptor = descriptor
        self._send, self._polled = _never_blocking(descriptor)
        self.restart()

    def restart(self) -> None:
        """Drop the buffer and the thread, which belong to the parent after a fork."""
        self.dropped = 0
        self._kept: deque[bytes] = deque()
        self._octets = 0
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._gathered: list[bytes] = []
        self.gather(None)

    def gather(self, call_soon: Callable[..., Any] | None) -> None:
        """Gather the lines of this thread, whose event loop has this ``call_soon``; None: no more."""
        self._call_soon = call_soon
        self._gatherer = threading.get_ident()
        if self._gathered:
            self.write("")

    @property
    def waits(self) -> bool:
        """Whether lines are buffered, or dropped and not yet reported."""
        return bool(self._kept or self.dropped)

    def write_soon(self, text: str) -> None:
        """Write whole lines at the end of the event loop's turn; at once where none gathers them."""
        if self._call_soon is None or threading.get_ident() != self._gatherer:
            self.write(text)
            return
        with self._lock:
            self._gathered.append(text.encode("utf-8", "backslashreplace"))
            is_first = len(self._gathered) == 1
        if is_first:
            try:
                self._call_soon(self.write, "")
            except RuntimeError:  # the loop has ended
                self.write("")

    def write(self, text: str) -> None:
        """Write whole lines, or buffer them, or drop them, after those gathered. Never blocks, never raises."""
        data = text.encode("utf-8", "backslashreplace")
        with self._lock:
            lines, self._gathered = self._gathered, []
            for piece in _pieces([*lines, data]):
                self._put(piece)

    def flush(self, seconds: float = 0.0) -> None:
        """Wait until the buffer is empty, at most ``seconds``."""
        deadline = time.monotonic() + seconds
        self.write("")
        while self.waits:
            with self._lock:
                if self._thread is None:
                    self._write_kept()
            if time.monotonic() >= deadline:
                return
            time.sleep(0.01)

    # With the lock

    def _put(self, data: bytes) -> None:
        if self._kept and self._thread is None:
            self._write_kept()
        if not self._kept and self._is_at_once and self._catch_up():
            data = self._attempt(data)
        if data:
            self._keep(data)

    @property
    def _is_at_once(self) -> bool:
        return self._send is not None or not self.threads

    def _attempt(self, data: bytes, *, is_line: bool = True) -> bytes:
        """Write without blocking; returns the rest that is left to write. After an error the data is dropped."""
        while data:
            try:
                if self._send is not None:
                    data = data[self._send(data) :]
                elif _takes(self._descriptor):
                    data = data[os.write(self._descriptor, data[:_PIECE]) :]
                else:
                    return data
            except (BlockingIOError, InterruptedError):
                return data
            except OSError:  # no reader, a full disk, or a closed descriptor
                self._refused = True
                if is_line:
                    self._drop(data)
                return b""
            self._refused = False
        return data

    def _catch_up(self) -> bool:
        """Report the number of dropped lines, if any; returns False if that cannot be written now."""
        count = self.dropped
        if not count:
            return True
        notice = self.tell(count).encode("utf-8", "backslashreplace")
        rest = self._attempt(notice, is_line=False)
        if len(rest) == len(notice):
            return False
        if not rest and self._refused:
            return True  # the line will be refused and counted as well
        self.dropped = 0
        if rest:
            self._kept.append(rest)
            self._octets += len(rest)
        return not rest

    def _keep(self, data: bytes) -> None:
        if self._octets + len(data) > _KEPT_OCTETS:
            self._drop(data)
            return
        self._kept.append(data)
        self._octets += len(data)
        if not self.threads:
            return
        if self._thread is None:
            self._begin()
        else:
            self._more.notify()

    def _write_kept(self) -> None:
        while self._kept:
            data = self._kept[0]
            rest = self._attempt(data)
            if rest:
                self._octets -= len(data) - len(rest)
                self._kept[0] = rest
                return
            self._octets -= len(data)
            self._kept.popleft()
        self._catch_up()

    def _drop(self, data: bytes) -> None:
        count = max(1, data.count(b"\n"))
        self.dropped += count
        if on_drop is not None:
            with contextlib.suppress(Exception):
                on_drop(count)

    def _begin(self) -> None:
        # Signals are for the main thread, which may wait for them with sigwait: this thread blocks them all.
        thread = threading.Thread(target=self._run, name="log", daemon=True)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        except RuntimeError:  # no thread can be started; tried again with the next line
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._thread = thread

    # In the thread

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._lock:
                if self._thread is not None and self._thread is not me:
                    return
                if self._send is not None:
                    self._write_kept()
                    if not self._kept and (self._refused or not self.dropped):
                        self._thread = None  # from now on lines are written at once again
                        return
                    data = b""
                else:
                    # A report that is refused as well must not cause another one.
                    while not self._kept and (self._refused or not self.dropped):
                        self._more.wait()
                    if self.dropped and not self._refused and self._octets < _KEPT_OCTETS // 2:
                        count, self.dropped = self.dropped, 0
                        self._kept.append(self.tell(count).encode("utf-8", "backslashreplace"))
                        self._octets += len(self._kept[-1])
                    data = self._kept[0]
            if self._send is not None:
                _wait_for_room(self._polled)
                continue
            try:
                written = os.write(self._descriptor, data[:_PIECE])  # may block for ever, but only this thread
            except OSError:
                with self._lock:
                    self._refused = True
                    self._octets -= len(data)
                    self._kept.popleft()
                    self._drop(data)
                time.sleep(0.01)
                continue
            with self._lock:
                self._refused = False
                self._octets -= written
                if rest := data[written:]:
                    self._kept[0] = rest
                else:
                    self._kept.popleft()


class Stream(io.TextIOBase):
    """A replacement for sys.stderr that does not block either."""

    def __init__(self, output: LogStream) -> None:
        super().__init__()
        self._output = output

    def write(self, text: str) -> int:
        if text:
            self._output.write(text)
        return len(text)

    def flush(self) -> None:
        self._output.flush()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2


_output: LogStream | None = None


def take_over(*, threads: bool) -> LogStream:
    """Return the LogStream of this process for standard error."""
    global _output  # noqa: PLW0603 - there is one in a process
    if _output is None:
        _output = LogStream(2)
        atexit.register(flush, _LAST_SECONDS)
    _output.threads = threads
    return _output


def gather(call_soon: Callable[..., Any] | None) -> None:
    """Gather the lines that this thread's event loop logs; None: no more. See ``LogStream``."""
    if _output is not None:
        _output.gather(call_soon)


def waits() -> bool:
    """Return whether lines are buffered, or dropped and not yet reported."""
    return _output is not None and _output.waits


def flush(seconds: float = _LAST_SECONDS) -> None:
    """Write the buffered lines, waiting at most ``seconds``."""
    if _output is not None:
        _output.flush(seconds)


def _restart() -> None:
    if _output is not None:
        _output.restart()


os.register_at_fork(after_in_child=_restart)


def _never_blocking(descriptor: int) -> tuple[Callable[[bytes], int] | None, int]:
    """Return a function that writes without blocking (None: there is none), and the descriptor to poll."""
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(kind):
            sock = socket.socket(fileno=os.dup(descriptor))
            return lambda data: sock.send(data, socket.MSG_DONTWAIT), descriptor
        if stat.S_ISREG(kind):
            return lambda data: os.write(descriptor, data), descriptor
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        again = os.open(f"/proc/self/fd/{descriptor}", flags)
    except OSError:  # closed, owned by another user, without a reader, or no Linux
        return None, descriptor
    return lambda data: os.write(again, data[:_PIECE]), again


def _pieces(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines, to so many octets as are written without another process's lines between them."""
    piece = b""
    for line in lines:
        if piece and len(piece) + len(line) > _PIECE:
            yield piece
            piece = b""
        piece += line
    if piece:
        yield piece


def _takes(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))


def _wait_for_room(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if any(mask & ~select.POLLOUT for _, mask in poll.poll(round(_LOOK_SECONDS * 1000))):
        time.sleep(0.05)  # the next write shows the error
