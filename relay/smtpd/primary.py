"""The primary leg: one mail transaction on the primary for one of the client's.

The primary's replies are the client's. What goes wrong between us and it (no connection, no reply in
time, a refusal that is about us and not about the message) becomes one temporary reply here and nowhere
else. After the primary's 354 there are two ends only: the dot, or a close. A connection closed in that
state is never used again: what came next would be text of the message.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from relay import faultpoints, maillog, metrics
from relay.client.connection import ClientError, Connection, ConnectionGone, DeadlinePassed
from relay.client.pool import Pool
from relay.client.server_limits import UNLIMITED, ServerLimits
from relay.client.xforward import NotIntroduced, introduce, xforward
from relay.mail.destination import Destination
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.mail.timeouts import MAIL_SECONDS, Timeouts

_BODY_SECONDS = 180.0  # RFC 5321 4.5.3.2.5, for one chunk
_ABOUT_US = (530, 534, 535, 538)  # the server wants us to authenticate: RFC 4954 6
_PROBE_PAUSE = 1.0
_TOO_MANY = Reply.of(452, "4.5.3 Too many recipients")
_REPETITIONS = 2  # of what a reused connection refused or did not live to answer; the pool may lend another such

Build = Callable[[Mapping[str, str]], Sequence[bytes]]

# What may be announced while the primary has not yet answered an EHLO.
SAFE_MINIMUM: Mapping[str, str] = {}


class NoReply(Exception):
    """The dot was sent and no reply came: the primary may have the message."""


def for_client(reply: Reply) -> Reply:
    """Return what the client hears of a primary's reply to MAIL, RCPT or DATA."""
    if reply.code == 421:
        return Reply(451, reply.lines)
    if reply.code in _ABOUT_US or not 200 <= reply.code < 600 or 300 <= reply.code < 400:
        return Reply.of(451, "4.3.5 The primary server does not accept mail from this relay")
    return reply


def for_client_at_rcpt(reply: Reply, *, is_first: bool) -> Reply:
    """Return what the client hears of a reply to RCPT.

    That this transaction has too many is never a reason to give the recipient up: 452 has the client send the message
    to the rest in another one (RFC 5321 4.5.3.1.10), whatever word the primary has for it.
    """
    if reply.is_permanent and not is_first and _is_about_the_transaction(reply):
        return _TOO_MANY
    return for_client(reply)


def _is_about_the_transaction(reply: Reply) -> bool:
    return reply.is_too_many_recipients or (reply.code in (452, 552) and not reply.status)


def for_client_at_end(reply: Reply) -> Reply:
    """Return what the client hears of a primary's reply to the message itself."""
    if reply.code == 421:
        return Reply(451, reply.lines)
    if not (reply.is_positive or 400 <= reply.code < 600):
        return Reply.of(451, "4.3.0 Unexpected reply of the primary server")
    return for_client(reply)


class Primary:
    """The primary as a place: its pool of connections, and what it last announced."""

    def __init__(self, destination: Destination, pool: Pool, *, timeouts: Timeouts, final_timeout: float) -> None:
        self.destination = destination
        self.pool = pool
        self.timeouts = timeouts
        self.final_timeout = final_timeout
        # LMTP answers the dot for each recipient and SMTP once: with two of them the client could not be told.
        self.most_recipients = 1 if destination.scheme == "lmtp" else sys.maxsize
        self.extensions: Mapping[str, str] | None = None
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = -_PROBE_PAUSE

    async def announced(self) -> Mapping[str, str]:
        """Return the extensions of the primary's last EHLO; asks for them once, and not twice a second.

        Nobody waits longer than for a dead host: a primary that is slow to greet is asked on, and known later.
        """
        if self.extensions is None:
            if self._probe is None and time.monotonic() - self._probed_at >= _PROBE_PAUSE:
                self._probe = asyncio.get_running_loop().create_task(self._ask())
            if self._probe is not None:
                await asyncio.wait([self._probe], timeout=self.timeouts.connect)
        return SAFE_MINIMUM if self.extensions is None else self.extensions

    async def begin(self, build: Build, identity: Identity = ()) -> tuple[PrimaryTransaction | None, Reply]:
        """Send MAIL, as ``build`` makes it for the extensions of the connection that serves (two nodes may differ).

        What ``build`` returns behind MAIL leaves with it: commands that the transaction will be asked for next. Returns
        the transaction, or None with the reply that refuses it. What ``build`` raises passes through. The primary is
        told first who the client is, where it wants to know.

        A kept connection that turns out to be dead before it answered anything is replaced unseen, and so is one whose
        refusal may be about the connection (session_refusals.py): what a new one says is the client's. Dead is also one
        that is silent for as long as a new connection may take: its host may be gone without a word.
        """
        until = time.monotonic() + MAIL_SECONDS
        repeated, doubted = 0, None
        while True:
            try:
                connection = await self.pool.lease(timeout=self.timeouts.connect, fresh=repeated > 0)
            except ClientError as error:
                return None, self.unavailable(error)
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
                return None, self.unavailable(error)
            except BaseException:
                self.pool.give_back(connection)  # closed there, unless nothing was sent
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
            try:
                if reply.code == 421 or reply.code in _ABOUT_US:
                    connection.close()
                else:
                    await self.take_back(connection)
            finally:
                self.pool.give_back(connection)
            return None, for_client(reply)

    def settle_doubt(self, doubted: Reply, reply: Reply) -> None:
        """Note what a new connection replied where a reused one had refused."""
        if reply.code < 400:
            self.pool.refusals.refuted(doubted)
        else:
            self.pool.refusals.confirmed(doubted)

    async def mail(
        self, connection: Connection, build: Build, identity: Identity, timeout: float
    ) -> tuple[list[bytes], Reply]:
        """Send MAIL and what ``build`` wants to leave with it, which is returned, with the reply to MAIL."""
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
            for _ in forward:  # whatever it says to them: they are for its log
                await connection.reply(timeout=timeout)
            return ahead, await connection.reply(timeout=timeout)
        for line in forward:
            await connection.command(line, timeout=timeout)
        return ahead, await connection.command(mail, timeout=timeout)

    def _left(self, until: float) -> float:
        """Return how long a new connection may take for MAIL: the client waits since before it was opened."""
        return max(self.timeouts.connect, min(self.timeouts.command, until - time.monotonic()))

    async def take_back(self, connection: Connection) -> None:
        """Hear the replies to commands that were sent ahead and came to nothing; it must not be in a DATA phase then.

        A server that says 354 where there is no recipient (RFC 2920 3.1 lets it) is closed, and so is one that is slow
        to say so often no: our client waits meanwhile. Raises nothing of its own.
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
        """Return what the client hears when the primary cannot be had."""
        self.trouble(error.stage, error)
        if error.reply is not None and error.reply.code in (421, 450, 451, 452):
            return Reply(451, error.reply.lines)
        return Reply.of(451, "4.4.1 The primary server is not available, try again later")

    async def _ask(self) -> None:
        try:
            connection = await self.pool.lease(timeout=self.timeouts.connect)
        except ClientError as error:
            self.trouble(error.stage, error)
        else:
            self.extensions = connection.extensions
            self.pool.give_back(connection)
        finally:
            self._probed_at = time.monotonic()
            self._probe = None

    def trouble(self, stage: str, error: BaseException) -> None:
        metrics.primary_trouble.labels(stage).inc()
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
        """``ahead`` are commands that left behind MAIL: they must be the next ones asked for.

        ``build`` and ``identity`` are for the case that a reused connection refuses what a new one may not.
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
        self._last = b""  # of the body, to leave with the dot
        self.extensions = connection.extensions

    async def rcpt(self, command: bytes) -> Reply:
        """Send RCPT; the reply is for the client."""
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
        """Say whether the server has announced that it takes no more recipients, or domains, and note this one."""
        domain = command.partition(b">")[0].rpartition(b"@")[2].lower()
        if self._ahead:  # it was counted before it left
            self._domains.add(domain)
            return False
        if self._asked >= limits.recipients or len(self._domains | {domain}) > limits.domains:
            return True
        self._domains.add(domain)
        return False

    async def data(self) -> Reply:
        """Send DATA. Only after 354 may ``write`` follow; any other reply ends the transaction."""
        reply = await self._command(b"DATA", "DATA")
        if reply.code == 354 and self._connection is not None:
            self._connection.begin_data()
            return reply
        if reply.is_positive:  # it took nothing, and nobody knows what it takes the next octets for
            self.abandon()
            return Reply.of(451, "4.3.0 Unexpected reply of the primary server")
        self.end()
        return reply if reply.code != 354 else _lost()

    async def withdraw(self) -> None:
        """Have a DATA that was sent ahead forgotten. A server that goes into the DATA phase for it is closed.

        The transaction is open as without it, and as good as one whose server has closed.
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
        """Pass chunks of the body on; a reply that comes before our dot ends the transaction and is returned."""
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
        """Keep the end of the body for ``finish``: one write, and one wake-up of the primary, less."""
        self._last = last

    async def finish(self) -> Reply:
        """Send what is held of the body, and the dot; returns the reply for the client. Raises NoReply.

        The connection is looked at first: lost before the dot, the message cannot have been accepted.
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
                # It spoke before it had read the dot: a refusal.
                return _early(error.reply)
            self._primary.trouble("dot", error)
            raise NoReply(str(error)) from error
        except BaseException:
            self.abandon()
            raise
        connection.end_data()
        self.end()
        return for_client_at_end(reply)

    def end(self) -> None:
        """End the transaction; the connection is kept when its state allows."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._primary.pool.give_back(connection)

    def abandon(self) -> None:
        """End the transaction with a close: the only way out of DATA besides the dot."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self._primary.pool.give_back(connection)

    async def _command(self, command: bytes, stage: str) -> Reply:
        """Send a command, on a new connection too where a reused one is not to be believed; returns the reply."""
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
        """Carry the transaction over to a new connection, up to this command; returns the reply to it.

        What the client has been told stays true: a recipient that was accepted is accepted there too, or the
        transaction is lost, as with its connection.
        """
        primary, ahead = self._primary, list(self._ahead)
        offered = self.extensions.keys()
        self.abandon()  # nothing was sent that could be taken for a message
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
                self.abandon()  # another node, which may not take what was said to the first
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
        """Send a command, unless it went ahead."""
        if not self._ahead:
            connection.send(command)
        elif self._ahead.popleft() != command:
            raise RuntimeError("another command was sent ahead")


def _lost() -> Reply:
    return Reply.of(451, "4.4.2 Lost the connection to the primary server, try again later")


def _early(reply: Reply) -> Reply:
    # The primary closes after such a reply; a permanent one is about this message all the same (552).
    if reply.is_positive:
        return _lost()
    return for_client_at_end(reply)
