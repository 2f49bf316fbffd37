"""Who the client is and what it may do: the connection, HELO, EHLO, STARTTLS, AUTH, XFORWARD and XCLIENT.

Clients in an allowed network and clients that have logged in may send mail. Others are refused: at connect if there
are no users to log in as, else at MAIL. AUTH is offered under TLS only, unless the settings say otherwise.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ssl

from relay import maillog, metrics
from relay.mail import addresses
from relay.mail import origin as mail_origin
from relay.mail.addresses import within
from relay.mail.esmtp import MAIL_EXTENSIONS
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.smtpd import xclient as smtpd_xclient
from relay.smtpd.context import Context
from relay.smtpd.end_of_data import ClientGone
from relay.smtpd.passwords import Busy
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.proxy_protocol import BadHeader, read_header
from relay.smtpd.syntax import SyntaxProblem, offers
from relay.smtpd.xclient import BadAttribute

AUTH_LINE = 12288  # octets; RFC 4954 4
_PROXY_SECONDS = 5.0  # for the PROXY header
_FAILURES = 5  # wrong passwords, then the client is disconnected
_FAILURE_PAUSE = 1.0  # seconds before the reply to each

_SHUTDOWN = Reply.of(421, "4.3.2 Service shutting down, try again later")
_CROWDED = Reply.of(421, "4.3.2 Too many connections, try again later")
_CROWD = Reply.of(421, "4.7.0 Too many connections from your address, try again later")
_TALKATIVE = Reply.of(554, "5.5.0 You talked before the greeting")
_TLS_FIRST = Reply.of(530, "5.7.0 Must issue a STARTTLS command first")
AUTH_FIRST = Reply.of(530, "5.7.0 Authentication required")
STRANGER = Reply.of(554, "5.7.1 Client address not allowed")
_NOT_NOW = Reply.of(421, "4.7.0 Temporary authentication failure, try again later")
_WRONG = Reply.of(535, "5.7.8 Authentication credentials invalid")


class Peer:
    """What one client has said and proved about itself, and the commands that say it."""

    def __init__(self, context: Context, protocol: ClientProtocol) -> None:
        self._context = context
        self._settings = context.settings.smtp
        self._protocol = protocol
        self._take_for(*protocol.peer)
        self._may_forward = False
        self._counted = ""  # the network prefix under which the client is counted
        self.helo = ""
        self.extended = False
        self.offered: frozenset[str] = frozenset()
        self.user = ""
        self._failures = 0
        self._given_helo = ""  # set by XCLIENT; replaces the name in HELO
        self._origin: Identity = ()  # set by XCLIENT
        self._forwarded: dict[str, str] = {}  # set by XFORWARD, for the next message

    def _take_for(self, address: str, port: int) -> None:
        """Set the client's address, and what follows from it."""
        self.address, self.port = address, port
        # An empty address is untrusted: a connection that is reset before it is accepted has no address any more, but
        # its data can still be read.
        self._is_local = addresses.is_loopback(address)
        self._is_allowed = self._settings.allows(address)
        # Whether LF is a line end and LF.LF the end of data for this client (smtp.bare_newline_exclusions).
        self.may_end_lines_with_lf = within(address, self._settings.bare_newline_exclusions)
        # Whether a bare CR or LF is refused.
        self.crlf_only = self._settings.bare_newline == "refuse" and not self.may_end_lines_with_lf

    # --- the connection ---------------------------------------------------------------------------------------

    async def arrive(self, *, implicit_tls: bool) -> Reply | None:
        """Do everything that comes before the greeting; returns the greeting, or None if the client is refused."""
        protocol = self._protocol
        if self._settings.proxy_protocol and not await self._read_proxy_header():
            return None
        refusal = self._unwelcome()
        if refusal is not None:
            metrics.connections_refused.inc()
            if not implicit_tls:
                protocol.dismiss(refusal)
            return None
        metrics.increment(metrics.connections)(1)
        if implicit_tls:
            context = self._context.credentials.tls
            if context is None or not await self._secure(context, keep=True):
                return None
        if self._settings.greeting_delay and not await self._kept_silent():
            protocol.dismiss(_TALKATIVE)
            return None
        return self.greeting

    @property
    def greeting(self) -> Reply:
        return Reply.of(220, f"{self._settings.domain} ESMTP smtp-dup")

    def leave(self) -> None:
        """Stop counting the client."""
        if self._counted:
            self._context.counters.count_address(self._counted, -1)
            self._counted = ""

    async def _read_proxy_header(self) -> bool:
        if not within(self.address, self._settings.proxy_networks):
            maillog.command_refused(self.address, "PROXY", STRANGER)
            return False
        try:
            async with asyncio.timeout(_PROXY_SECONDS):
                origin = await read_header(self._protocol.read_buffer)
        except (BadHeader, TimeoutError) as error:
            maillog.proxy_failed(self.address, str(error) or "no PROXY header in time")
            return False
        if origin is not None:
            self._take_for(*origin)
        return True

    def _unwelcome(self) -> Reply | None:
        context, settings = self._context, self._settings
        if context.stopping and not context.leaving:
            return _SHUTDOWN
        if context.is_crowded:
            return _CROWDED
        if settings.max_connections_per_client:
            self._counted = addresses.network_prefix(self.address)
            context.counters.count_address(self._counted, 1)
            if context.counters.connections_of(self._counted) > settings.max_connections_per_client:
                maillog.command_refused(self.address, "connect", _CROWD)
                return _CROWD
        self._may_forward = within(self.address, settings.xforward_networks)
        if not self._is_trusted and context.credentials.users is None and not self._may_forward:
            maillog.command_refused(self.address, "connect", STRANGER)
            return STRANGER
        return None

    async def _secure(self, context: ssl.SSLContext, first: Reply | None = None, *, keep: bool = False) -> bool:
        """Negotiate TLS and drop everything the client said before it (RFC 3207 4.2); returns whether it succeeded."""
        reason = await self._protocol.start_tls(context, first, keep=keep)
        if reason:
            maillog.tls_failed(self.address, reason)
        self.helo, self.extended, self.offered, self.user, self._forwarded = "", False, frozenset(), "", {}
        return not reason

    async def _kept_silent(self) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.greeting_delay):
                # Any data, and the end of input too, is too early.
                await self._protocol.read_buffer.read(1)
                return False
        return True

    # --- what it may do ---------------------------------------------------------------------------------------

    @property
    def _is_trusted(self) -> bool:
        return self._is_allowed or bool(self.user)

    def objection(self) -> Reply | None:
        """Return the reply that refuses mail from this client, or None if it may send."""
        if self._needs_tls:
            return _TLS_FIRST
        if not self._is_trusted:
            return STRANGER if self._context.credentials.users is None else AUTH_FIRST
        return None

    @property
    def _needs_tls(self) -> bool:
        return self._settings.tls == "encrypt" and not self._protocol.tls

    @property
    def _offers_auth(self) -> bool:
        safe = self._protocol.tls or self._settings.auth_without_tls
        return self._context.credentials.users is not None and safe and not self.user

    @property
    def _offers_tls(self) -> bool:
        return self._context.credentials.tls is not None and self._settings.tls != "none" and not self._protocol.tls

    def identity(self) -> Identity:
        """Return the identity of the original client, for the servers behind this relay; () for a local client."""
        if self._forwarded:
            return tuple((name, value) for name, value in self._forwarded.items() if value)
        if self._is_local and not self._origin:
            return ()
        return self._origin or mail_origin.of_client(self.address, self.port, self.helo, extended=self.extended)

    @property
    def is_spoken_for(self) -> bool:
        """Whether the identity comes from XFORWARD or XCLIENT and not from the connection."""
        return bool(self._forwarded or self._origin)

    def end_transaction(self) -> None:
        """Forget what XFORWARD said; it is for one message only."""
        self._forwarded = {}

    # --- commands ---------------------------------------------------------------------------------------------

    async def hello(self, name: str, *, extended: bool) -> Reply:
        """HELO, EHLO."""
        if not name or len(name) > 255:
            raise SyntaxProblem(501, f"5.5.4 Syntax: {'EHLO' if extended else 'HELO'} hostname")
        lines, self.offered = await self._offers() if extended else ((), frozenset())
        self.helo, self.extended = self._given_helo or name, extended
        return Reply.of(250, self._settings.domain, *lines)

    async def _offers(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the lines of the EHLO reply, and the extensions whose commands and parameters are accepted."""
        primary = self._context.snapshot.primary
        primaries = self._context.route_primaries
        if primaries is None:
            announced = await primary.announced()
            is_known = primary.extensions is not None
        else:
            announced, is_known = await primaries.announced(self._context.snapshot)
        most = self._settings.max_message_bytes
        lines, offered = offers(tuple(announced.items()), most, tls=self._protocol.tls)
        ours = []
        if self._offers_tls:
            ours.append("STARTTLS")
        if self._offers_auth:
            ours.append("AUTH PLAIN LOGIN")
        if self._may_forward:
            ours += [f"XFORWARD {' '.join(smtpd_xclient.XFORWARD)}", f"XCLIENT {' '.join(smtpd_xclient.XCLIENT)}"]
        if self._context.credentials.users is not None:
            offered |= {"AUTH"}
        if not is_known:
            # The primary's extensions are not known yet: none is announced, but a parameter gets no permanent refusal.
            # Some clients, such as a Postfix proxy, use extensions that they did not see.
            offered |= frozenset(MAIL_EXTENSIONS.values()) - (frozenset() if self._protocol.tls else {"REQUIRETLS"})
        return (*lines, *ours), offered

    async def starttls(self, argument: str) -> Reply | None:
        if argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: STARTTLS")
        if self._protocol.tls:
            return Reply.of(503, "5.5.1 TLS is already active")
        context = self._context.credentials.tls
        if context is None or not self._offers_tls:
            return Reply.of(502, "5.5.1 STARTTLS is not offered")
        await self._secure(context, Reply.of(220, "2.0.0 Ready to start TLS"))
        return None

    async def xforward(self, argument: str) -> Reply:
        if not self._may_forward:
            return Reply.of(550, "5.7.0 XFORWARD is not for you")
        if self._needs_tls:
            return _TLS_FIRST
        try:
            self._forwarded |= smtpd_xclient.read_attributes(argument, smtpd_xclient.XFORWARD)
        except BadAttribute as problem:
            raise SyntaxProblem(501, f"5.5.4 XFORWARD: {problem}") from problem
        return Reply.of(250, "2.0.0 Ok")

    async def xclient(self, argument: str) -> Reply:
        """Replace the client's identity by the one given; the session starts over with another greeting."""
        if not self._may_forward:
            return Reply.of(550, "5.7.0 XCLIENT is not for you")
        if self._needs_tls:
            return _TLS_FIRST
        try:
            given = smtpd_xclient.read_attributes(argument, smtpd_xclient.XCLIENT)
        except BadAttribute as problem:
            raise SyntaxProblem(501, f"5.5.4 XCLIENT: {problem}") from problem
        if "ADDR" in given:
            self._take_for(given["ADDR"] or "unknown", 0)
        self.port = int(given.get("PORT", "") or self.port)
        self._given_helo = given.get("HELO", self._given_helo)
        self.user = given.get("LOGIN", self.user)
        self.helo, self.extended, self.offered, self._forwarded = "", False, frozenset(), {}
        known = dict(self._origin) | {name: value for name, value in given.items() if name in smtpd_xclient.XFORWARD}
        self._origin = tuple((name, value) for name, value in known.items() if value)
        return self.greeting

    # --- AUTH (RFC 4954) --------------------------------------------------------------------------------------

    async def auth(self, argument: str) -> Reply:
        users = self._context.credentials.users
        if self._needs_tls:
            return _TLS_FIRST
        if users is None:
            return Reply.of(502, "5.5.1 AUTH is not offered")
        if self.user:
            return Reply.of(503, "5.5.1 Already authenticated")
        if not self.extended:
            return Reply.of(503, "5.5.1 EHLO first")
        if not self._offers_auth:
            return Reply.of(538, "5.7.11 Encryption required for requested authentication mechanism")
        if not argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: AUTH mechanism")
        mechanism, _, initial = argument.partition(" ")
        ask = {"PLAIN": self._plain, "LOGIN": self._login}.get(mechanism.upper())
        if ask is None:
            return Reply.of(504, "5.5.4 Unrecognized authentication type")
        name, password = await ask(initial.strip())
        right = await self._is_right(name, password)
        if right is None:
            return _NOT_NOW
        if self._protocol.is_gone:
            raise ClientGone
        return self._logged_in(name) if right else await self._turned_away(name)

    def _logged_in(self, name: str) -> Reply:
        self.user = name
        self._failures = 0
        metrics.logins.labels("accepted").inc()
        maillog.logged_in(self.address, name)
        return Reply.of(235, "2.7.0 Authentication successful")

    async def _turned_away(self, name: str) -> Reply:
        """Answer a wrong password after a pause: returns 421 at the limit, else raises SyntaxProblem with 535."""
        self._failures += 1
        self._context.counters.guesses.add(addresses.network_prefix(self.address))
        metrics.logins.labels("refused").inc()
        maillog.login_refused(self.address, name)
        await self._protocol.pause(_FAILURE_PAUSE)
        if self._failures >= _FAILURES:
            return Reply.of(421, "4.7.0 Too many failed logins, goodbye")
        raise SyntaxProblem(_WRONG.code, *_WRONG.lines)

    async def _is_right(self, name: str, password: str) -> bool | None:
        """Return whether a password is right, or None if it was not checked: too many at once or too many wrong."""
        users = self._context.credentials.users
        if users is None:
            return None
        with contextlib.suppress(Busy):
            if not self._context.counters.guesses.are_too_many(addresses.network_prefix(self.address)):
                return await users.check(name, password, lambda: not self._protocol.is_gone, self._context.counters)
            if users.remembers(name, password):
                return True
        metrics.logins.labels("refused").inc()
        maillog.login_refused(self.address, name, "too many at once, or too many wrong ones from this address")
        await self._protocol.pause(_FAILURE_PAUSE)
        return None

    async def _plain(self, initial: str) -> tuple[str, str]:
        parts = (await self._response(initial, "")).split("\0")
        if len(parts) != 3 or not parts[1]:
            raise SyntaxProblem(501, "5.5.2 Malformed PLAIN response")
        authorized, name, password = parts
        # Nobody may act for another user; with an empty name the check fails.
        return (name if authorized in ("", name) else ""), password

    async def _login(self, initial: str) -> tuple[str, str]:
        name = await self._response(initial, "VXNlcm5hbWU6")  # "Username:"
        return name, await self._response("", "UGFzc3dvcmQ6")  # "Password:"

    async def _response(self, initial: str, challenge: str) -> str:
        """Return a decoded response: the initial one sent with AUTH, or the client's answer to our challenge."""
        if not initial:
            await self._protocol.push(Reply.of(334, challenge))
            line = await self._protocol.read_line(self._settings.idle_timeout, AUTH_LINE)
            if line is None:
                raise ClientGone
            if not line:
                raise SyntaxProblem(500, "5.5.6 Authentication exchange line is too long")
            initial = line.strip(b" \t\r\n").decode("ascii", "replace")
            if initial == "*":
                raise SyntaxProblem(501, "5.7.0 Authentication cancelled")
        elif initial == "=":
            initial = ""  # an empty initial response
        try:
            return base64.b64decode(initial, validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            raise SyntaxProblem(501, "5.5.2 Cannot decode the response") from None
