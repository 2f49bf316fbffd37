"""The command loop of one client: command lines in, replies out, until the client quits or is disconnected.

Each line is looked up in the table at the end of this file and answered by the Peer (who the client is) or by the
MailTransaction (MAIL, RCPT, DATA, BDAT). Replies are written here, except those in the middle of a command (354, 334,
the 220 before TLS). An unexpected exception becomes 451. A disconnect cancels nothing: it is read as the end of input.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from relay import maillog, metrics
from relay.mail.reply import Reply
from relay.smtpd.context import Context
from relay.smtpd.end_of_data import ClientGone
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.peer import AUTH_LINE, Peer
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.syntax import LINE_LIMIT, SyntaxProblem, argument_text, as_ordinary, nothing_after, split_command
from relay.smtpd.transaction import INTERNAL, MailTransaction

_OK = Reply.of(250, "2.0.0 Ok")
_BYE = Reply.of(221, "2.0.0 Bye")
_NESTED = Reply.of(503, "5.5.1 Not within a mail transaction")
_TOO_MANY_ERRORS = Reply.of(421, "4.7.0 Too many errors, goodbye")
_SHUTDOWN = Reply.of(421, "4.3.2 Service shutting down, try again later")


def take(context: Context, *, tls: bool = False) -> ClientProtocol:
    """Return the protocol of a new connection, which starts its command loop; ``tls``: with a TLS handshake."""
    smtp = context.settings.smtp
    seconds = min(smtp.idle_timeout, smtp.lease_idle_timeout)
    return ClientProtocol(
        lambda protocol: CommandLoop(context, protocol).run(implicit_tls=tls),
        write_seconds=seconds,
        count=context.counters.add_octets,
        watch=context.watch,
    )


class CommandLoop:
    """Reads the commands of one client and writes the replies."""

    def __init__(self, context: Context, protocol: ClientProtocol) -> None:
        self._context = context
        self._protocol = protocol
        self._peer = Peer(context, protocol)
        self._error_limits = ErrorLimits()
        self._transaction = MailTransaction(context, protocol, self._peer, self._error_limits)
        self._over = False  # after the next reply

    # --- the loop ---------------------------------------------------------------------------------------------

    async def run(self, *, implicit_tls: bool) -> None:
        """Serve one client until it disconnects."""
        context, protocol, transaction, limits = self._context, self._protocol, self._transaction, self._error_limits
        context.command_loops.add(self)
        context.counters.add_client(1)
        try:
            greeting = await self._peer.arrive(implicit_tls=implicit_tls)
            if greeting is None:
                return
            await protocol.push(greeting)
            while True:
                line = protocol.line_at_hand() if protocol.read_buffer.data else None
                if line is None and (line := await protocol.line(transaction.patience)) is None:
                    break
                try:
                    reply = await self._command(line)
                except Exception as error:
                    reply = self._reply_to(error)
                if limits.bad and limits.are_unbearable:
                    reply = _TOO_MANY_ERRORS
                if reply is not None and protocol.put(reply):
                    await protocol.catch_up()
                if reply is not None and (self._over or transaction.is_lost or reply.code == 421):
                    break
                if context.stopping and not transaction.in_transaction and not self._may_stay:
                    await protocol.push(_SHUTDOWN)
                    break
        except ClientGone:
            pass
        finally:
            transaction.forget()
            transaction.report.log_the_rest()
            try:
                await protocol.close()
            finally:
                self._peer.leave()
                context.command_loops.discard(self)
                context.counters.add_client(-1)

    def stop(self, *, impatient: bool) -> None:
        """End an idle session now, and one in a transaction after it; if ``impatient``, before its end of data.

        A client that sends nothing for some seconds is not waited for, and after a while no primary
        that leaves a command unanswered, except by a process that is being replaced.
        """
        transaction, protocol = self._transaction, self._protocol
        is_idle = not transaction.in_transaction and not self._may_stay
        is_final = not self._context.leaving  # no other process with newer settings replaces this one
        if protocol.is_deaf or (protocol.is_securing and not self._may_stay):
            protocol.abort()
        elif not protocol.waiting:
            if impatient and is_final and not transaction.is_concluding:
                protocol.cancel()
        elif is_idle or (impatient and not transaction.in_data) or (is_final and (impatient or protocol.is_silent)):
            protocol.dismiss(_SHUTDOWN)

    @property
    def _may_stay(self) -> bool:
        """Whether this process is only being replaced and the client has not yet sent a message over it."""
        return self._context.leaving and not self._transaction.was_served

    def _reply_to(self, error: Exception) -> Reply:
        """Return the reply to a command that raised: at this border the unexpected becomes 451. Raises ClientGone."""
        if isinstance(error, SyntaxProblem):
            self._error_limits.bad += 1
            return error.reply
        if isinstance(error, ClientGone):
            raise error
        maillog.session_error(self._peer.address, error)
        metrics.session_errors.inc()
        self._transaction.forget()
        return INTERNAL

    def _command(self, line: bytes) -> Awaitable[Reply | None]:
        """Return what answers a command line, with None if the reply has been sent. Raises SyntaxProblem."""
        if len(line) <= LINE_LIMIT and (ordinary := as_ordinary(line)) is not None:
            found, argument = ordinary.groups(b"")
            verb, text = found.upper(), argument.decode("ascii")
        else:
            verb, text = self._mended(line)
        if (mailing := _MAILING.get(verb)) is not None:
            return mailing(self._transaction, text)
        if (command := _COMMANDS.get(verb)) is None:
            raise _unknown(verb)
        if verb != b"QUIT":
            self._error_limits.idle()
        return command(self, text)

    def _mended(self, line: bytes) -> tuple[bytes, str]:
        """Return the verb and the argument of a command line of any form. Raises SyntaxProblem."""
        verb, argument = split_command(line)
        if not line or (len(line) > LINE_LIMIT and (verb != b"AUTH" or len(line) > AUTH_LINE)):
            raise SyntaxProblem(500, "5.5.2 Line too long")
        if verb not in _MAILING and verb not in _COMMANDS:
            raise _unknown(verb)
        text = argument_text(argument)
        if not line.endswith(b"\r\n") and self._peer.crlf_only:
            raise SyntaxProblem(500, "5.5.2 A command must end with CRLF")
        return verb, text

    # --- commands ---------------------------------------------------------------------------------------------

    async def _hello(self, name: str, *, extended: bool) -> Reply:
        reply = await self._peer.hello(name, extended=extended)
        self._transaction.forget()
        return reply

    async def _introduce(self, argument: str, command: Callable[[Peer, str], Awaitable[Reply | None]]) -> Reply | None:
        """Run a command that is only allowed between transactions: STARTTLS, AUTH, XFORWARD, XCLIENT."""
        if self._transaction.in_transaction:
            return self._transaction.out_of_order(_NESTED)
        return await command(self._peer, argument)

    async def _noop(self, _: str) -> Reply:
        return _OK

    async def _rset(self, argument: str) -> Reply:
        nothing_after("RSET", argument)
        self._transaction.forget()
        return _OK

    async def _quit(self, _: str) -> Reply:
        # With an argument it is an error (RFC 5321 4.3.2), but whoever says so leaves all the same; Postfix agrees.
        self._over = True
        return _BYE

    async def _vrfy(self, argument: str) -> Reply:
        if not argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: VRFY address")
        return Reply.of(252, "2.1.5 Cannot verify, but will pass the message on")

    async def _help(self, _: str) -> Reply:
        return Reply.of(214, "2.0.0 " + " ".join(verb.decode() for verb in (*_COMMANDS, *_MAILING)))


_Command = Callable[[CommandLoop, str], Awaitable[Reply | None]]


def _between(command: Callable[[Peer, str], Awaitable[Reply | None]]) -> _Command:
    return lambda loop, argument: loop._introduce(argument, command)


# ruff: noqa: SLF001 - the table belongs to the class
_COMMANDS: Mapping[bytes, _Command] = {
    b"HELO": lambda loop, name: loop._hello(name, extended=False),
    b"EHLO": lambda loop, name: loop._hello(name, extended=True),
    b"STARTTLS": _between(Peer.starttls),
    b"AUTH": _between(Peer.auth),
    b"XFORWARD": _between(Peer.xforward),
    b"XCLIENT": _between(Peer.xclient),
    b"RSET": CommandLoop._rset,
    b"NOOP": CommandLoop._noop,
    b"QUIT": CommandLoop._quit,
    b"VRFY": CommandLoop._vrfy,
    b"HELP": CommandLoop._help,
}
# What brings a message: it has a table of its own, so that nothing lies between it and the loop.
_MAILING: Mapping[bytes, Callable[[MailTransaction, str], Awaitable[Reply]]] = {
    b"MAIL": MailTransaction.mail,
    b"RCPT": MailTransaction.rcpt,
    b"DATA": MailTransaction.data,
    b"BDAT": MailTransaction.bdat,
}
_UNIMPLEMENTED = (b"EXPN", b"SEND", b"SOML", b"SAML", b"TURN", b"ETRN")
_OTHER_PROTOCOLS = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT")  # a web page abuses a browser for SMTP


def _unknown(verb: bytes) -> SyntaxProblem:
    if verb in _OTHER_PROTOCOLS:
        return SyntaxProblem(421, "4.7.0 This is SMTP, goodbye")
    if verb in _UNIMPLEMENTED:
        return SyntaxProblem(502, "5.5.1 Command not implemented")
    return SyntaxProblem(500, "5.5.2 Command not recognized")
