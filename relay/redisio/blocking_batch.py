"""Sends what a pipeline of redis-py's has gathered as one write, with far fewer calls than its own ``execute``.

As there, the batch is sent again over a new connection as often as the client's retries allow; then the RedisError is
raised. It may nevertheless have been done.
"""

from __future__ import annotations

from typing import Any

from redis.client import Pipeline
from redis.exceptions import ResponseError

from relay.redisio.pipeline import CommandBatch


def execute(pipeline: Pipeline) -> list[Any]:
    """Return the replies, of a transaction those of EXEC. Raises RedisError, also the error of one command.

    They come as Redis gives them, which depends on the protocol: redis-py's conversions are left out.
    """
    gathered: Any = pipeline  # its types do not tell "transaction" of redis-py's function
    batch = CommandBatch()
    commands = [arguments for arguments, _ in gathered.command_stack]
    if gathered.transaction:
        batch.transaction(commands)
    else:
        for command in commands:
            batch.add(command)
    connection = gathered.connection_pool.get_connection()
    try:
        replies = connection.retry.call_with_retry(lambda: _ask(connection, batch), lambda _: connection.disconnect())
    except BaseException:  # what is still to come would be taken for the replies to the next batch
        connection.disconnect()
        raise
    finally:
        gathered.connection_pool.release(connection)
    answers = batch.answers(replies)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return list(answers[0]) if gathered.transaction else answers


def _ask(connection: Any, batch: CommandBatch) -> list[Any]:
    connection.send_packed_command(batch.packed)
    return [_reply(connection) for _ in range(batch.replies_owed)]


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response()
    except ResponseError as error:
        return error
