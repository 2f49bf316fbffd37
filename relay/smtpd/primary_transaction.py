"""One mail transaction on the primary for each transaction of a client, from MAIL to the reply to the final dot.

The client gets the primary's replies. A fault between the relay and the primary (no connection, no reply in time, a
refusal of the relay rather than of the message) becomes a temporary reply. A reused connection that fails before the
354 is replaced by a new one unseen. After the 354 a transaction ends with the dot or with a close. A connection in that
state is never used again: the primary would read the next command as text of the message.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from relay import faultpoints
from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectionGone, DeadlinePassed
from relay.client.pool import PoolExhausted
from relay.client.server_limits import UNLIMITED, ServerLimits
from relay.client.xforward import NotIntroduced
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.mail.timeouts import MAIL_SECONDS, Timeouts
from relay.smtpd.primary import Build, Primary
from relay.smtpd.primary_replies import (
    ABOUT_US,
    LOST,
    TOO_MANY,
    UNEXPECTED,
    for_client,
    for_client_at_end,
    for_client_at_rcpt,
    for_client_early,
)

_BODY_SECONDS = 180.0  # RFC 5321 4.5.3.2.5, for one chunk
_REPETITIONS = 2  # of a MAIL that reused connections refused


class Unusable(Exception):
    """Nobody can have the message: no connection, or a 421 or nothing in reply to MAIL. ``reply`` is the client's.

    ``is_ours``: all connections that we may have are in use. ``peer``: the address that MAIL was sent to, if any.
    """

    def __init__(self, reply: Reply, reason: str, *, is_ours: bool = False, peer: tuple[Any, ...] = ()) -> None:
        super().__init__(reason)
        self.reply = reply
        self.reason = reason
        self.is_ours = is_ours
        self.peer = peer


class NoReply(Exception):
    """The dot was sent and no reply came: the primary may have the message."""


async def begin(
    primary: Primary, build: Build, identity: Identity = (), *, or_raise: bool = False, until: float | None = None
) -> tuple[PrimaryTransaction | None, Reply]:
    """Send MAIL; returns the transaction, or None with the reply that refuses it, and the reply for the client.

    With ``or_raise`` it raises Unusable where the primary has not said a word about this message. ``until`` (monotonic)
    is when the client may give up; by default it has just begun to wait.

    ``build`` makes the commands for the extensions of the leased connection (two nodes may differ): MAIL, and
    behind it the commands that the transaction will be asked for next. What ``build`` raises passes through.
    ``identity`` is sent first, by XCLIENT or XFORWARD, to a primary that offers them.

    A reused connection is replaced without the client noticing when it is dead before its first answer, or when its
    refusal may be about the connection (session_refusals.py); the client gets the reply of the new one. A silence
    of ``timeouts.connect`` also counts as dead, since the host may have vanished.
    """
    until = time.monotonic() + MAIL_SECONDS if until is None else until
    turned_away: set[tuple[Any, ...]] = set()
    while True:
        try:
            return await _begin(primary, build, identity, until)
        except Unusable as trouble:
            # DNS may have another host for the domain, which is another server: each is asked once.
            if primary.destination.scheme == "mx" and trouble.peer and trouble.peer not in turned_away:
                turned_away.add(trouble.peer)
            elif or_raise:
                raise
            else:
                return None, trouble.reply


async def _begin(
    primary: Primary, build: Build, identity: Identity, until: float
) -> tuple[PrimaryTransaction | None, Reply]:
    """Begin, as above. Raises Unusable."""
    pool, repeated, doubted = primary.pool, 0, None
    while True:
        try:
            kept = None if repeated else pool.at_hand()
            connection = kept or await pool.lease(timeout=primary.timeouts.connect, fresh=repeated > 0)
        except ClientError as error:
            raise _unusable(primary, error) from error
        reused = connection.transactions > 0
        most = primary.timeouts.connect if reused else _left(primary.timeouts, until)
        try:
            ahead = deque[bytes]()
            reply = await primary.mail(connection, build, identity, ahead, most)
        except ClientError as error:
            connection.close()
            pool.give_back(connection)
            if reused and isinstance(error, ConnectionGone | DeadlinePassed | NotIntroduced):
                repeated += 1
                continue
            raise _unusable(primary, error, connection.peer) from error
        except BaseException:
            pool.give_back(connection)  # the pool closes it, unless nothing was sent
            raise
        may_repeat = repeated < _REPETITIONS
        if reused and reply.code >= 400 and (reply.code == 421 or (may_repeat and pool.refusals.is_doubtful(reply))):
            connection.close()
            pool.give_back(connection)
            repeated, doubted = repeated + 1, reply
            continue
        if doubted is not None:
            primary.pool.refusals.settle(doubted, (reply,))
        if 200 <= reply.code < 300:
            return PrimaryTransaction(primary, connection, ahead, build, identity, reused=reused), reply
        await _give_back_refused(primary, connection, reply)
        if reply.code == 421:
            raise Unusable(for_client(reply), f"MAIL: {reply.text}", peer=connection.peer)
        return None, for_client(reply)


async def _give_back_refused(primary: Primary, connection: Connection, reply: Reply) -> None:
    """Give back a connection whose MAIL was refused."""
    try:
        if reply.code == 421 or reply.code in ABOUT_US:
            connection.close()
        else:
            await primary.take_back(connection)
    finally:
        primary.pool.give_back(connection)


def _unusable(primary: Primary, error: ClientError, peer: tuple[Any, ...] = ()) -> Unusable:
    is_ours = isinstance(error, PoolExhausted) and error.reply is None
    return Unusable(primary.unavailable(error), str(error), is_ours=is_ours, peer=peer)


def _left(timeouts: Timeouts, until: float) -> float:
    """Return how many seconds a new connection may take for MAIL, since the client has been waiting already."""
    return max(timeouts.connect, min(timeouts.command, until - time.monotonic()))


class PrimaryTransaction:
    """One transaction on a leased connection, from MAIL to its end."""

    def __init__(
        self,
        primary: Primary,
        connection: Connection,
        ahead: deque[bytes],
        build: Build,
        identity: Identity,
        *,
        reused: bool,
    ) -> None:
        """``ahead`` are the commands sent behind MAIL: they must be the next ones asked for.

        ``build`` and ``identity`` serve to repeat the transaction on a new connection when a reused one fails.
        """
        self._primary = primary
        self._connection: Connection | None = connection
        self._ahead = ahead
        self._build = build
        self._identity = identity
        self._reused = reused
        self._accepted: list[bytes] = []  # RCPT commands
        self._asked = 0
        self._domains: set[bytes] = set()
        self._last = b""  # the end of the body, to be sent with the dot
        self.extensions = connection.extensions

    def rcpt(self, command: bytes) -> Awaitable[Reply]:
        """Send RCPT; returns the reply for the client, to be awaited."""
        return self._command(command, "RCPT")

    def _exceeds(self, limits: ServerLimits, command: bytes) -> bool:
        """Return whether this RCPT exceeds the limits that the server announced; if not, note its domain."""
        domain = command.partition(b">")[0].rpartition(b"@")[2].lower()
        if self._ahead:  # checked before it was sent ahead
            self._domains.add(domain)
            return False
        if self._asked >= limits.recipients or len(self._domains | {domain}) > limits.domains:
            return True
        self._domains.add(domain)
        return False

    def data(self) -> Awaitable[Reply]:
        """Send DATA; returns the reply for the client, to be awaited. Any but a 354 ends the transaction."""
        return self._command(b"DATA", "DATA")

    async def withdraw(self) -> None:
        """Undo a DATA that was sent ahead; the transaction stays open.

        If the server enters the DATA phase for it, the connection is closed, and the next command gets "lost".
        """
        connection = self._connection
        if connection is None or not self._ahead:
            return
        self._ahead.clear()
        try:
            await self._primary.take_back(connection)
        except BaseException:
            self.abandon()
            raise
        if not connection.is_open:
            self.abandon()

    async def write(self, chunks: Sequence[bytes]) -> Reply | None:
        """Send chunks of the body; returns None, or the reply for the client if the transaction has ended early."""
        connection = self._connection
        if connection is None:
            return LOST
        try:
            for chunk in chunks:
                await connection.write_body(chunk, timeout=_BODY_SECONDS)
        except ClientError as error:
            early = connection.early_reply
            if early is None:
                self._primary.trouble("body", error)
            self.abandon()
            return for_client_early(early) if early is not None else LOST
        if connection.early_reply is not None:
            early = connection.early_reply
            self.abandon()
            return for_client_early(early)
        return None

    def hold(self, last: bytes) -> None:
        """Keep the end of the body for ``finish``, to save a write and a wake-up of the primary."""
        self._last = last

    async def finish(self) -> Reply:
        """Send the held end of the body and the dot; returns the reply for the client. Raises NoReply.

        The connection is checked first: if it is lost before the dot, the message cannot have been accepted.
        """
        connection = self._connection
        if connection is None:
            return LOST
        try:
            connection.end_body(self._last)
        except ClientError as error:
            self.abandon()
            return for_client_early(error.reply) if error.reply is not None else LOST
        faultpoints.reach("dot sent")
        try:
            reply = await connection.reply(timeout=self._primary.final_timeout)
        except ClientError as error:
            self.abandon()
            if error.reply is not None:
                # A reply sent before the dot was read is a refusal.
                return for_client_early(error.reply)
            self._primary.trouble("dot", error)
            raise NoReply(str(error)) from error
        except BaseException:
            self.abandon()
            raise
        connection.end_data()
        self.end()
        if self._primary.witness is not None:
            self._primary.witness.works()
        return for_client_at_end(reply)

    def end(self) -> None:
        """End the transaction; the pool keeps the connection if its state allows."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._primary.pool.give_back(connection)

    def abandon(self) -> None:
        """End the transaction by closing the connection: besides the dot, the only way out of DATA."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._primary.pool.give_back(connection)

    def give_up(self, stage: str) -> None:
        """End the transaction because others wait for it, who go on."""
        if self._connection is not None:
            self._primary.trouble(stage, TimeoutError("no answer in time, while another primary goes on"))
            self.abandon()

    async def _command(self, command: bytes, stage: str) -> Reply:
        """Send RCPT or DATA; returns the reply for the client. Repeats on a new connection if a reused one fails."""
        connection = self._connection
        if connection is None:
            return LOST
        if stage == "RCPT":
            if connection.limits is not UNLIMITED and self._exceeds(connection.limits, command):
                return TOO_MANY
            self._asked += 1
        try:
            if self._ahead:
                self._send(connection, command)
            else:
                connection.send(command)
            reply = await connection.reply(timeout=self._primary.timeouts.command)
        except ClientError as error:
            may_repeat = self._reused and isinstance(error, ConnectionGone)
            reply = await self._repeat(command, stage, None) if may_repeat else self._gone(stage, error)
        except BaseException:
            self.abandon()
            raise
        else:
            if reply.code != 354 and not 200 <= reply.code < 300:
                is_doubtful = self._primary.pool.refusals.is_doubtful
                again = self._reused and reply.code >= 400 and (reply.code == 421 or is_doubtful(reply))
                reply = await self._repeat(command, stage, reply) if again else self._read(stage, reply)
        return self._after_rcpt(command, reply) if stage == "RCPT" else self._after_data(reply)

    def _after_rcpt(self, command: bytes, reply: Reply) -> Reply:
        if 200 <= reply.code < 300:
            self._accepted.append(command)
            return reply
        return for_client_at_rcpt(reply, is_first=self._asked == 1)

    def _after_data(self, reply: Reply) -> Reply:
        if reply.code == 354 and self._connection is not None:
            self._connection.begin_data()
            return reply
        if reply.is_positive:  # a 2xx to DATA: it is unknown how the server would read the next octets
            self.abandon()
            return UNEXPECTED
        self.end()
        return reply if reply.code != 354 else LOST

    def _read(self, stage: str, reply: Reply) -> Reply:
        if reply.code == 421:
            self.abandon()
        if stage == "DATA" and reply.code == 354:
            return reply
        return reply if stage == "RCPT" else for_client(reply)

    def _gone(self, stage: str, error: ClientError) -> Reply:
        self._primary.trouble(stage, error)
        self.abandon()
        return LOST

    async def _repeat(self, command: bytes, stage: str, doubted: Reply | None) -> Reply:
        """Repeat the transaction on a new connection, up to this command; returns the reply to it.

        Replies already given to the client must stay true: unless MAIL and all accepted recipients are accepted again,
        the transaction is lost, as it is with its connection.
        """
        primary, ahead = self._primary, list(self._ahead)
        offered = self.extensions.keys()
        self.abandon()  # safe: no message has been sent
        self._ahead.clear()
        self._reused = False
        try:
            connection = self._connection = await primary.pool.lease(timeout=primary.timeouts.connect, fresh=True)
        except ClientError as error:
            return primary.unavailable(error)

        def build(extensions: Mapping[str, str]) -> list[bytes]:
            mail = self._build(extensions)[0]
            return [mail, *self._accepted, command, *ahead] if "PIPELINING" in extensions else [mail]

        try:
            if not connection.extensions.keys() >= offered:
                self.abandon()  # another node, without an extension that may be in use
                return LOST
            reply = await primary.mail(connection, build, self._identity, self._ahead, primary.timeouts.command)
            for accepted in self._accepted if reply.is_positive else ():
                self._send(connection, accepted)
                reply = await connection.reply(timeout=primary.timeouts.command)
                if not reply.is_positive:
                    break
            if not reply.is_positive:
                self.abandon()
                return LOST
            self.extensions = connection.extensions
            self._send(connection, command)
            reply = await connection.reply(timeout=primary.timeouts.command)
        except ClientError as error:
            return self._gone(stage, error)
        except BaseException:
            self.abandon()
            raise
        if doubted is not None:
            primary.pool.refusals.settle(doubted, (reply,))
        return self._read(stage, reply)

    def _send(self, connection: Connection, command: bytes) -> None:
        """Send a command, unless it was sent ahead."""
        if not self._ahead:
            connection.send(command)
        elif self._ahead.popleft() != command:
            raise RuntimeError("another command was sent ahead")
