"""Sends batches of commands to Redis, bypassing redis-py's stream and parser, which take longer than Redis itself.

redis-py makes the connections: addresses, passwords, TLS, Sentinels. A _Pipeline then takes over the transport; with
Sentinels, which may name another master at any time, for one batch only. A batch is sent in one write and gets one
answer for each change, an exception for a change that failed. A connection failure is a RedisError or an OSError for
the whole batch, which may nevertheless have been done; the batch is repeated once on a new connection, since every
change is idempotent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

import hiredis
from redis.asyncio import Redis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import InvalidResponse, ReadOnlyError, RedisError

from relay.redisio import raw_connection, replication
from relay.redisio.raw_connection import discard, living

_IN_PARTS = 256 << 10  # octets of a batch; below this, one buffer is faster
_SECONDS = 10.0  # for the answer, if the client has no time-out
_NOT_YET = object()
_CLOSED = "Redis closed the connection"
_ENDED = "the client is closed"

T = TypeVar("T")

Answers = list[Any] | Exception
Answered = Callable[[Answers], None]


class CommandBatch:
    """Commands, encoded as they are added, with those methods of a redis-py pipeline that the ledger needs.

    A large batch (``size``, octets) stays in parts, since joining them would copy every body in memory.
    """

    def __init__(self, size: int = 0) -> None:
        self.is_large = size > _IN_PARTS
        self._parts: list[bytes] = []
        self._replies: list[int] = []  # number of replies to each change

    def eval(self, *arguments: Any) -> None:
        self.add(("EVAL", *arguments))

    def add(self, command: Sequence[Any]) -> None:
        self._replies.append(1)
        self._pack(command)

    def transaction(self, commands: Sequence[Sequence[Any]]) -> None:
        """Add commands that are one atomic change. An argument may be in parts: a tuple of bytes."""
        self._replies.append(len(commands) + 2)
        for command in (("MULTI",), *commands, ("EXEC",)):
            self._pack(command)

    def _pack(self, command: Sequence[Any]) -> None:
        if not self.is_large:
            self._parts.append(hiredis.pack_command(tuple(command)))
            return
        self._parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            octets = argument if isinstance(argument, tuple) else (_octets(argument),)
            self._parts += (b"$%d\r\n" % sum(map(len, octets)), *octets, b"\r\n")

    @property
    def packed(self) -> Sequence[bytes]:
        return self._parts if self.is_large else (b"".join(self._parts),)

    @property
    def replies_owed(self) -> int:
        return sum(self._replies)

    def answers(self, replies: Sequence[Any]) -> list[Any]:
        """Return the answer to each change: the last reply, or the first error in any."""
        if len(replies) == len(self._replies):
            return list(replies)
        answers, at = [], 0
        for count in self._replies:
            answers.append(_answer(replies[at : at + count]))
            at += count
        return answers


class Pipelines:
    """The connections of one client. ``seconds`` limits connecting and each answer; None: the client's time-out."""

    def __init__(self, client: Redis, *, seconds: float | None = None) -> None:
        self._pool: Any = client.connection_pool
        self._keeps = not isinstance(self._pool, SentinelConnectionPool)
        self._confirmation = replication.confirmation(client)
        self._seconds = seconds or self._pool.connection_kwargs.get("socket_timeout") or _SECONDS
        self._idle: list[_Pipeline] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False

    async def ask(self, batch: CommandBatch, *, each: bool = False) -> list[Any]:
        """Send a batch; returns its answers. Raises RedisError, OSError.

        A single change that failed raises, too, or with ``each`` has its error in place of the answer.
        """
        found: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

        def answered(answers: Answers) -> None:
            if found.done():  # the caller was cancelled
                return
            if not isinstance(answers, Exception):
                error = next((answer for answer in answers if isinstance(answer, Exception)), None)
                if error is None or each:
                    found.set_result(answers)
                    return
                answers = error
            found.set_exception(answers)

        self.send(batch, answered)
        return await found

    def send(self, batch: CommandBatch, answered: Answered) -> bool:
        """Send a batch; ``answered`` is called once, with its answers or with the exception that prevented them.

        Returns whether it is on its way: a new connection has to be opened first.
        """
        for command in self._confirmation:
            batch.add(command)
        while self._idle:
            wire = self._idle.pop()
            if wire.is_open:
                self._send(wire, batch, answered, is_last=False)
                return True
            self._drop(wire)
        self._connect(batch, answered, is_last=False)
        return False

    def _connect(self, batch: CommandBatch, answered: Answered, *, is_last: bool) -> None:
        if self._is_closed:
            answered(NoConnection(_ENDED))
            return

        def connected(task: asyncio.Task[_Pipeline]) -> None:
            if task.cancelled():  # by ``close``: whoever waits for the answer would wait for ever
                answered(NoConnection(_ENDED))
                return
            error = task.exception()
            if isinstance(error, Exception):  # of any kind, since the caller waits for the answer
                answered(error)
            elif error is None:
                self._send(task.result(), batch, answered, is_last=is_last)

        # The batch is no part of the task: from Python 3.12 a connection keeps the frames of the call that made it.
        self._spawn(self._take_over()).add_done_callback(connected)

    async def _take_over(self) -> _Pipeline:
        async with asyncio.timeout(self._seconds):
            connection = await living(self._pool)
            try:
                return _Pipeline(connection)
            except BaseException:
                await discard(self._pool, connection)
                raise

    async def close(self) -> None:
        """End what is under way. The client is closed after this: a connection that opens later would stay open.

        So would one for a batch that loses its connection by that, and is sent once more.
        """
        self._is_closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, wire: _Pipeline, batch: CommandBatch, answered: Answered, *, is_last: bool) -> None:
        wire.send(batch, self._seconds, partial(self._take, wire, batch, answered, is_last))

    def _take(self, wire: _Pipeline, batch: CommandBatch, answered: Answered, is_last: bool, answers: Answers) -> None:
        if not isinstance(answers, Exception):
            answers = _trouble(answers) or answers
        if isinstance(answers, Exception):
            lost, self._idle = [wire, *self._idle], []  # the idle connections are probably lost too
            for each in lost:
                self._drop(each)
            if not is_last and isinstance(answers, NoConnection):
                self._connect(batch, answered, is_last=True)
                return
        elif self._keeps:
            self._idle.append(wire)
        else:
            self._spawn(self._give_back(wire))
        answered(self._confirmed(answers))

    def _confirmed(self, answers: Answers) -> Answers:
        if not self._confirmation or isinstance(answers, Exception):
            return answers
        *answers, mark, replicas = answers
        try:
            # If the write before WAIT failed, WAIT may have had nothing to wait for.
            replication.check(mark if isinstance(mark, Exception) else replicas, self._confirmation[-1][1])
        except RedisError as error:
            return error
        return answers

    async def _give_back(self, wire: _Pipeline) -> None:
        wire.leave()
        await self._pool.release(wire.connection)

    def _drop(self, wire: _Pipeline) -> None:
        wire.close()
        self._spawn(discard(self._pool, wire.connection))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Pipeline(asyncio.Protocol):
    """One connection, taken over from redis-py, with at most one batch under way."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._transport = raw_connection.transport(connection)
        self._owner = self._transport.get_protocol()
        self._parser = hiredis.Reader(replyError=raw_connection.error_parser(connection), notEnoughData=_NOT_YET)
        self._replies: list[Any] = []
        self._batch: CommandBatch | None = None
        self._owed = 0
        self._answered: Answered | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None  # one serves many batches
        self._is_lost = False
        self._transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        return not self._transport.is_closing()

    def send(self, batch: CommandBatch, seconds: float, answered: Answered) -> None:
        """Send a batch; ``answered`` is called once, with its answers or with the exception that prevented them."""
        if not self.is_open:  # since it was made: nobody would tell
            answered(NoConnection(_CLOSED))
            return
        self._batch, self._owed, self._answered = batch, batch.replies_owed, answered
        self._deadline = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline, self._expire, seconds)
        self._transport.writelines(batch.packed)

    def leave(self) -> None:
        """Give the transport back to redis-py."""
        self._cancel()
        self._transport.set_protocol(self._owner)

    def close(self) -> None:
        """Close at once, since a late answer would be taken for that of the next batch."""
        if not self._is_lost:  # asyncio would call connection_lost() again
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
            while (reply := self._parser.gets()) is not _NOT_YET:
                if not isinstance(reply, hiredis.PushNotification):
                    self._replies.append(reply)
        except hiredis.HiredisError as error:
            self._break(InvalidResponse(str(error)))
            return
        surplus = len(self._replies) - self._owed
        # It is unknown which reply is superfluous, and the rest would be taken for those of the next batch.
        if surplus > 0 or (surplus == 0 and self._parser.has_data()):
            self._break(InvalidResponse("more answers than questions"))
        elif surplus == 0 and self._batch is not None:
            self._end(self._batch.answers(self._replies))

    def eof_received(self) -> None:
        self._break(NoConnection(_CLOSED))  # with TLS, connection_lost may come much later

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._cancel()
        self._owner.connection_lost(exc)
        self._end(NoConnection(_CLOSED))

    def _break(self, error: Exception) -> None:
        self.close()
        self._end(error)

    def _expire(self, seconds: float) -> None:
        self._timer = None
        if self._answered is not None and self._deadline <= self._loop.time():
            self._end(TimeoutError(f"no answer within {seconds:g} s"))
        elif self._answered is not None:
            self._timer = self._loop.call_at(self._deadline, self._expire, seconds)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, answers: Answers) -> None:
        answered, self._answered, self._batch, self._owed, self._replies = self._answered, None, None, 0, []
        if answered is not None:
            answered(answers)


def _octets(argument: Any) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


def _answer(replies: Sequence[Any]) -> Any:
    # After an earlier error, EXEC says only that there was one.
    last = replies[-1]
    parts = last if len(replies) > 1 and isinstance(last, list) else ()
    return next((reply for reply in (*replies, *parts) if isinstance(reply, Exception)), last)


def _trouble(answers: Sequence[Any]) -> NoConnection | None:
    """Return an error that concerns the whole connection: the server is a replica or loading, or auth is needed."""
    for answer in answers:
        if isinstance(answer, ReadOnlyError):  # the same name may lead to another server, the master, by now
            return NoConnection("the server is a replica")
        if isinstance(answer, NoConnection):
            return answer
    return None
