"""A command that waits in Redis (BLMOVE, BLPOP), and that another thread or a signal handler can end before its time.

It is ended by saying that nothing more is sent over its connection: Redis drops a client whose commands it cannot get
any more, also one that waits, and what it has answered before that is read. No right to other commands (CLIENT UNBLOCK)
is needed. Whether the command was executed at the last moment is not known then.
"""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from relay.redisio import raw_connection


class Blocking:
    """Sends commands that wait, one at a time, over connections of a client; none any more after ``end``."""

    def __init__(self, client: Redis) -> None:
        self._pool: Any = client.connection_pool
        self._connection: Any = None
        self.is_ended = False

    def execute(self, *words: Any) -> Any:
        """Return the reply; None when it was ended, now or before. Raises RedisError."""
        try:
            return None if self.is_ended else self._execute(words)
        except RedisError:
            if self.is_ended:
                return None
            raise

    def _execute(self, words: tuple[Any, ...]) -> Any:
        connection = self._pool.get_connection()  # connected
        try:
            self._connection = connection
            if self.is_ended:  # from here on ``end`` finds the connection
                return None
            connection.send_command(*words)
            return connection.read_response()
        except BaseException:  # its reply would be taken for that of the next command
            connection.disconnect()
            raise
        finally:
            self._connection = None
            self._pool.release(connection)

    def end(self) -> None:
        """End the command that waits; it raises nothing and may come at any moment."""
        self.is_ended = True
        if connection := self._connection:
            raw_connection.end_sending(connection)
