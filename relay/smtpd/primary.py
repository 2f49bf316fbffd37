"""The primary leg: one mail transaction on the primary for each transaction of a client.

The client gets the primary's replies. A fault between the relay and the primary (no connection, no reply in time, a
refusal of the relay rather than of the message) becomes a temporary reply here and nowhere else. After the primary's
354 a transaction ends with the dot or with a close. A connection in that state is never used again: the primary would
read the next command as text of the message.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from relay import faultpoints, maillog, metrics
from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectionGone, DeadlinePassed
from relay.client.pool import Pool, PoolExhausted
from relay.client.server_limits import UNLIMITED, ServerLimits
from relay.client.xforward import NotIntroduced, introduce, xforward
from relay.mail.destination import Destination
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.mail.timeouts import MAIL_SECONDS, Timeouts

_BODY_SECONDS = 180.0  # RFC 5321 4.5.3.2.5, for one chunk
_ABOUT_US = (530, 534, 535, 538)  # the server wants the relay to authenticate: RFC 4954 6
_PROBE_PAUSE = 1.0
_AFTER_MAIL = ("RCPT", "DATA", "body", "dot")  # stages at which a transaction breaks off
_TOO_MANY = Reply.of(452, "4.5.3 Too many recipients")
_REPETITIONS = 2  # of a MAIL that reused connections refused

Build = Callable[[Mapping[str, str]], Sequence[bytes]]

# The extensions to announce before the primary has answered an EHLO.
SAFE_MINIMUM: Mapping[str, str] = {}


class Unusable(Exception):
    """Nobody can have the message: no connection, or a 421 or nothing in reply to MAIL. ``reply`` is the client's.

    ``is_ours``: all connections that we may have are in use.
    """

    def __init__(self, reply: Reply, reason: str, *, is_ours: bool = False) -> None:
        super().__init__(reason)
        self.reply = reply
        self.reason = reason
        self.is_ours = is_ours


class Witness(Protocol):
    """Who wants to know how transactions end at a primary."""

    def breaks(self, reason: str) -> None:
        """Note a transaction that broke off after MAIL."""

    def works(self) -> None:
        """Note a message that the server has answered for."""


class NoReply(Exception):
    """The dot was sent and no reply came: the primary may have the message."""


def for_client(reply: Reply) -> Reply:
    """Return the reply for the client, made of the primary's reply to MAIL, RCPT or DATA."""
    if reply.code == 421:
        return Reply(451, reply.lines)
    if reply.code in _ABOUT_US or not 200 <= reply.code < 600 or 300 <= reply.code < 400:
        return Reply.of(451, "4.3.5 The primary server does not accept mail from this relay")
    return reply


def for_client_at_rcpt(reply: Reply, *, is_first: bool) -> Reply:
    """Return the reply for the client, made of the primary's reply to RCPT.

    Too many recipients in this transaction is no permanent fault of the recipient: whatever the primary's code, the
    client gets 452 and sends to the rest in another transaction (RFC 5321 4.5.3.1.10).
    """
    if reply.is_permanent and not is_first and _is_about_the_transaction(reply):
        return _TOO_MANY
    return for_client(reply)


def _is_about_the_transaction(reply: Reply) -> bool:
    return reply.is_too_many_recipients or (reply.code in (452, 552) and not reply.status)


def for_client_at_end(reply: Reply) -> Reply:
    """Return the reply for the client, made of the primary's reply to the final dot."""
    if reply.code == 421:
        return Reply(451, reply.lines)
    if not (reply.is_positive or 400 <= reply.code < 600):
        return Reply.of(451, "4.3.0 Unexpected reply of the primary server")
    return for_client(reply)


class Primary:
    """The primary server: its pool of connections, and the extensions it last announced."""

    def __init__(self, destination: Destination, pool: Pool, *, timeouts: Timeouts, final_timeout: float) -> None:
        self.destination = destination
        self.pool = pool
        self.timeouts = timeouts
        self.final_timeout = final_timeout
        # LMTP answers the dot once for each recipient; the client can only be given one of these replies.
        self.most_recipients = 1 if destination.scheme == "lmtp" else sys.maxsize
        self.extensions: Mapping[str, str] | None = None
        self.witness: Witness | None = None  # of a primary that has substitutes
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = -_PROBE_PAUSE

    async def announced(self) -> Mapping[str, str]:
        """Return the extensions of the primary's last EHLO; until one is known, asks for it at most once a second.

        The wait is bounded by the connect timeout: a primary that greets slowly is known later, to other clients.
        """
        if self.extensions is None:
            self.ask_soon()
            if self._probe is not None:
                await asyncio.wait([self._probe], timeout=self.timeouts.connect)
        return SAFE_MINIMUM if self.extensions is None else self.extensions

    def ask_soon(self) -> None:
        """Have the primary asked for its extensions, at most once a second, without waiting for it."""
        if self._probe is None and time.monotonic() - self._probed_at >= _PROBE_PAUSE:
            self._probe = asyncio.get_running_loop().create_task(self._ask())

    async def begin(
        self, build: Build, identity: Identity = (), *, or_raise: bool = False
    ) -> tuple[PrimaryTransaction | None, Reply]:
        """Send MAIL; returns the transaction, or None with the reply that refuses it, and the reply for the client.

        With ``or_raise`` it raises Unusable where the primary has not said a word about this message.

        ``build`` makes the commands for the extensions of the leased connection (two nodes may differ): MAIL, and
        behind it the commands that the transaction will be asked for next. What ``build`` raises passes through.
        ``identity`` is sent first, by XCLIENT or XFORWARD, to a primary that offers them.

        A reused connection is replaced without the client noticing when it is dead before its first answer, or when its
        refusal may be about the connection (session_refusals.py); the client gets the reply of the new one. A silence
        of ``timeouts.connect`` also counts as dead, since the host may have vanished.
        """
        until = time.monotonic() + MAIL_SECONDS
        repeated, doubted = 0, None
        while True:
            try:
                connection = await self.pool.lease(timeout=self.timeouts.connect, fresh=repeated > 0)
            except ClientError as error:
                return None, self._no_connection(error, or_raise=or_raise)
            reused = connection.transactions > 0
            most = self.timeouts.connect if reused else self._left(until)
            try:
                ahead, reply = await self.mail(connection, build, identity, most)
            except ClientError as error:
                connection.close()
                self.pool.give_back(connection)
                if reused and isinstance(error, ConnectionGone | DeadlinePassed | NotIntroduced):
                    repeated += 1
                    continue
                return None, self._no_connection(error, or_raise=or_raise)
            except BaseException:
                self.pool.give_back(connection)  # the pool closes it, unless nothing was sent
                raise
            if reused and (reply.code == 421 or (repeated < _REPETITIONS and self.pool.refusals.is_doubtful(reply))):
                connection.close()
                self.pool.give_back(connection)
                repeated, doubted = repeated + 1, reply
                continue
            if doubted is not None:
                self.settle_doubt(doubted, reply)
            if reply.is_positive:
                return PrimaryTransaction(self, connection, ahead, build, identity, reused=reused), reply
            await self._give_back_refused(connection, reply)
            if reply.code == 421 and or_raise:
                raise Unusable(for_client(reply), f"MAIL: {reply.text}")
            return None, for_client(reply)

    async def _give_back_refused(self, connection: Connection, reply: Reply) -> None:
        """Give back a connection whose MAIL was refused."""
        try:
            if reply.code == 421 or reply.code in _ABOUT_US:
                connection.close()
            else:
                await self.take_back(connection)
        finally:
            self.pool.give_back(connection)

    def _no_connection(self, error: ClientError, *, or_raise: bool) -> Reply:
        reply = self.unavailable(error)
        if or_raise:
            is_ours = isinstance(error, PoolExhausted) and error.reply is None
            raise Unusable(reply, str(error), is_ours=is_ours) from error
        return reply

    def settle_doubt(self, doubted: Reply, reply: Reply) -> None:
        """Note whether a new connection repeated the refusal ``doubted`` of a reused one."""
        if reply.code < 400:
            self.pool.refusals.refuted(doubted)
        else:
            self.pool.refusals.confirmed(doubted)

    async def mail(
        self, connection: Connection, build: Build, identity: Identity, timeout: float
    ) -> tuple[list[bytes], Reply]:
        """Send MAIL and the commands ``build`` puts behind it; returns those commands and the reply to MAIL."""
        if identity or connection.introduced:
            return await self._introduced_mail(connection, build, identity, timeout)
        self.extensions = connection.extensions
        mail, *ahead = build(connection.extensions)
        connection.send(mail, *ahead)
        return ahead, await connection.reply(timeout=timeout)

    async def _introduced_mail(
        self, connection: Connection, build: Build, identity: Identity, timeout: float
    ) -> tuple[list[bytes], Reply]:
        turned_away = await introduce(connection, identity, timeout=timeout)
        if turned_away is not None:
            return [], turned_away
        self.extensions = connection.extensions
        mail, *ahead = build(connection.extensions)
        forward = xforward(identity, connection)
        if "PIPELINING" in connection.extensions:
            connection.send(*forward, mail, *ahead)
            for _ in forward:  # the replies to XFORWARD do not matter: it serves the primary's log
                await connection.reply(timeout=timeout)
            return ahead, await connection.reply(timeout=timeout)
        for line in forward:
            await connection.command(line, timeout=timeout)
        return ahead, await connection.command(mail, timeout=timeout)

    def _left(self, until: float) -> float:
        """Return how many seconds a new connection may take for MAIL, since the client has been waiting already."""
        return max(self.timeouts.connect, min(self.timeouts.command, until - time.monotonic()))

    async def take_back(self, connection: Connection) -> None:
        """Read the replies to commands that were sent ahead in vain, so that the connection can be kept.

        It is closed when a reply is positive, above all a 354 without recipients (allowed by RFC 2920 3.1), and when
        the replies take longer than ``timeouts.connect``, since the client waits. Never raises ClientError.
        """
        deadline = time.monotonic() + self.timeouts.connect
        try:
            while connection.replies_owed:
                reply = await connection.reply(timeout=max(0.0, deadline - time.monotonic()))
                if reply.code < 400 or reply.code == 421:
                    connection.close()
        except ClientError:
            connection.close()

    def unavailable(self, error: ClientError) -> Reply:
        """Log that no connection to the primary can be had; returns the reply for the client."""
        self.trouble(error.stage, error)
        if error.reply is not None and error.reply.code in (421, 450, 451, 452):
            return Reply(451, error.reply.lines)
        return Reply.of(451, "4.4.1 The primary server is not available, try again later")

    async def connect(self) -> None:
        """Open a connection as for mail, with EHLO, TLS and AUTH, and keep it for the next. Raises ClientError."""
        connection = await self.pool.lease(timeout=self.timeouts.connect)
        self.extensions = connection.extensions
        self.pool.give_back(connection)

    async def probe(self) -> None:
        """See that a new connection can be had, with EHLO, TLS and AUTH, and end it with QUIT. Raises ClientError."""
        connection = await self.pool.lease(timeout=self.timeouts.connect, fresh=True)
        try:
            self.extensions = connection.extensions
            await connection.quit()
        finally:
            connection.close()
            self.pool.give_back(connection)

    async def _ask(self) -> None:
        try:
            await self.connect()
        except ClientError as error:
            self.trouble(error.stage, error)
        finally:
            self._probed_at = time.monotonic()
            self._probe = None

    def trouble(self, stage: str, error: BaseException) -> None:
        metrics.primary_trouble.labels(stage).inc()
        if self.witness is not None and stage in _AFTER_MAIL:
            self.witness.breaks(f"{stage}: {error}")
        maillog.primary_trouble(self.destination.address, stage, str(error) or type(error).__name__)


class PrimaryTransaction:
    """One transaction on a leased connection, from MAIL to its end."""

    def __init__(
        self,
        primary: Primary,
        connection: Connection,
        ahead: Iterable[bytes],
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
        self._ahead = deque(ahead)
        self._build = build
        self._identity = identity
        self._reused = reused
        self._accepted: list[bytes] = []  # RCPT commands
        self._asked = 0
        self._domains: set[bytes] = set()
        self._last = b""  # the end of the body, to be sent with the dot
        self.extensions = connection.extensions

    async def rcpt(self, command: bytes) -> Reply:
        """Send RCPT; returns the reply for the client."""
        connection = self._connection
        if connection is not None and connection.limits is not UNLIMITED and self._exceeds(connection.limits, command):
            return _TOO_MANY
        is_first = not self._asked
        self._asked += 1
        reply = await self._command(command, "RCPT")
        if reply.is_positive:
            self._accepted.append(command)
            return reply
        return for_client_at_rcpt(reply, is_first=is_first)

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

    async def data(self) -> Reply:
        """Send DATA; returns the reply for the client. ``write`` may follow a 354; any other ends the transaction."""
        reply = await self._command(b"DATA", "DATA")
        if reply.code == 354 and self._connection is not None:
            self._connection.begin_data()
            return reply
        if reply.is_positive:  # a 2xx to DATA: it is unknown how the server would read the next octets
            self.abandon()
            return Reply.of(451, "4.3.0 Unexpected reply of the primary server")
        self.end()
        return reply if reply.code != 354 else _lost()

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
            return _lost()
        try:
            for chunk in chunks:
                await connection.write_body(chunk, timeout=_BODY_SECONDS)
        except ClientError as error:
            early = connection.early_reply
            if early is None:
                self._primary.trouble("body", error)
            self.abandon()
            return _early(early) if early is not None else _lost()
        if connection.early_reply is not None:
            early = connection.early_reply
            self.abandon()
            return _early(early)
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
            return _lost()
        try:
            connection.end_body(self._last)
        except ClientError as error:
            self.abandon()
            return _early(error.reply) if error.reply is not None else _lost()
        faultpoints.reach("dot sent")
        try:
            reply = await connection.reply(timeout=self._primary.final_timeout)
        except ClientError as error:
            self.abandon()
            if error.reply is not None:
                # A reply sent before the dot was read is a refusal.
                return _early(error.reply)
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

    async def _command(self, command: bytes, stage: str) -> Reply:
        """Send a command; returns the reply for the client. Repeats on a new connection if a reused one fails."""
        connection = self._connection
        if connection is None:
            return _lost()
        try:
            self._send(connection, command)
            reply = await connection.reply(timeout=self._primary.timeouts.command)
        except ConnectionGone as error:
            if not self._reused:
                return self._gone(stage, error)
            return await self._repeat(command, stage, None)
        except ClientError as error:
            return self._gone(stage, error)
        except BaseException:
            self.abandon()
            raise
        if self._reused and (reply.code == 421 or self._primary.pool.refusals.is_doubtful(reply)):
            return await self._repeat(command, stage, reply)
        return self._read(stage, reply)

    def _read(self, stage: str, reply: Reply) -> Reply:
        if reply.code == 421:
            self.abandon()
        if stage == "DATA" and reply.code == 354:
            return reply
        return reply if stage == "RCPT" else for_client(reply)

    def _gone(self, stage: str, error: ClientError) -> Reply:
        self._primary.trouble(stage, error)
        self.abandon()
        return _lost()

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
                return _lost()
            sent, reply = await primary.mail(connection, build, self._identity, primary.timeouts.command)
            self._ahead.extend(sent)
            for accepted in self._accepted if reply.is_positive else ():
                self._send(connection, accepted)
                reply = await connection.reply(timeout=primary.timeouts.command)
                if not reply.is_positive:
                    break
            if not reply.is_positive:
                self.abandon()
                return _lost()
            self.extensions = connection.extensions
            self._send(connection, command)
            reply = await connection.reply(timeout=primary.timeouts.command)
        except ClientError as error:
            return self._gone(stage, error)
        except BaseException:
            self.abandon()
            raise
        if doubted is not None:
            primary.settle_doubt(doubted, reply)
        return self._read(stage, reply)

    def _send(self, connection: Connection, command: bytes) -> None:
        """Send a command, unless it was sent ahead."""
        if not self._ahead:
            connection.send(command)
        elif self._ahead.popleft() != command:
            raise RuntimeError("another command was sent ahead")


def _lost() -> Reply:
    return Reply.of(451, "4.4.2 Lost the connection to the primary server, try again later")


def _early(reply: Reply) -> Reply:
    # The primary usually closes after such a reply; still, a permanent one is about this message (552).
    if reply.is_positive:
        return _lost()
    return for_client_at_end(reply)
